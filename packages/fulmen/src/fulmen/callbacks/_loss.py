"""The loss among what ``on_train_batch_end`` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError

__all__ = ["loss_among"]


def loss_among(outputs: object, who: str) -> Tensor | None:
    """The loss in ``outputs``; None where the step left the batch out.

    Args:
        outputs: as the hook gets them.
        who: the callback that asks.

    Raises:
        MisconfigurationException: there is none, as manual optimization may return what it likes.
    """
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    if not isinstance(outputs, Mapping):
        raise MisconfigurationTypeError(
            f"{who} got a {type(outputs).__name__} from training_step: return the loss as a tensor, or a dict with "
            "'loss'."
        )
    found = cast("Mapping[str, object]", outputs)
    if not found:  # the step returned None
        return None
    loss = found.get("loss")
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"{who} found no tensor under 'loss' in the outputs of training_step, only {sorted(found)!r}: return the "
            "loss under that name."
        )
    return loss
