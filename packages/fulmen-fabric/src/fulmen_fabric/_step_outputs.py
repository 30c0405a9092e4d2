"""What a training step returned: its loss, and what others get to see of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from fulmen_protocols import MisconfigurationException

__all__ = ["loss_of", "missing_loss", "visible"]


def visible(output: object, loss: Tensor | None) -> object:
    """What ``on_train_batch_end`` is given for the ``output`` of a training step."""
    if loss is None:
        return {}
    loss = loss.detach()
    if not isinstance(output, Mapping):
        return {"loss": loss}
    return {**cast("Mapping[object, object]", output), "loss": loss}


def loss_of(output: object) -> Tensor | None:
    """The loss in what a training step returned, if that is no tensor; None where the step leaves the batch out.

    Raises:
        MisconfigurationException: there is none, or it has a wrong type.
    """
    if output is None:
        return None
    if isinstance(output, Mapping):
        outputs = cast("Mapping[object, object]", output)
        loss = outputs.get("loss")
        if isinstance(loss, Tensor):
            return loss
        if "loss" not in outputs:
            raise MisconfigurationException(
                f"training_step returned a mapping with the keys {sorted(map(str, outputs))}, none of which is 'loss'. "
                "Add the loss under 'loss', or return it alone."
            )
        raise MisconfigurationException(
            f"training_step returned 'loss' of type {type(loss).__name__}; it must be a tensor of shape ()."
        )
    raise MisconfigurationException(
        f"training_step returned {type(output).__name__}; return a loss tensor, a mapping with 'loss', or None to skip "
        "the batch."
    )


def missing_loss(batch_idx: int, world_size: int) -> MisconfigurationException:
    """The error for a step that returned None where a batch cannot be left out: somebody waits for its gradients."""
    waiting = (
        f" on one of {world_size} ranks. The others would wait for its gradients: return"
        if world_size > 1
        else ", and the strategy's engine needs a backward pass for every batch. Return"
    )
    return MisconfigurationException(
        f"training_step returned None for batch {batch_idx}{waiting} a loss of zero weight instead, such as "
        "`0.0 * output.sum()`."
    )
