"""The arguments that several strategies for XLA devices take alike."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from functools import partial
from typing import TYPE_CHECKING, Any

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError
from fulmen_protocols.strategy import StrategyParts
from fulmen_xla._library import library

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch
    from torch import nn

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.precision import Precision

__all__ = ["parts_of", "wrap_policy"]


def parts_of(
    strategy: str,
    accelerator: Accelerator | None,
    parallel_devices: Sequence[torch.device] | None,
    checkpoint_io: CheckpointIO | None,
    precision: Precision | None,
    precision_plugin: Precision | None,
) -> StrategyParts:
    """What the user has given to a strategy, under the names that Fabric's and the Trainer's users know.

    Raises:
        MisconfigurationTypeError: ``precision`` is a name, not an object.
        MisconfigurationException: two precisions were given.
    """
    if isinstance(precision, str):
        raise MisconfigurationTypeError(
            f"{strategy}(precision={precision!r}) is a name. Pass XLAPrecision({precision!r}), or give "
            f"precision={precision!r} to the Trainer or Fabric."
        )
    if precision is not None and precision_plugin is not None:
        raise MisconfigurationException(
            f"{strategy} got precision= and precision_plugin=, which are two names of one thing. Give one of the two."
        )
    return StrategyParts(
        accelerator=accelerator,
        parallel_devices=parallel_devices,
        checkpoint_io=checkpoint_io,
        precision=precision if precision_plugin is None else precision_plugin,
    )


def wrap_policy(
    strategy: str, asked: Collection[type[nn.Module]] | Callable[..., bool] | None
) -> Callable[[], Callable[..., bool]] | None:
    """torch-xla's policy for which layers are wrapped: made from classes of layers, or the user's own.

    Called when it is needed, since it imports torch-xla.

    Raises:
        MisconfigurationTypeError: neither classes nor a function.
    """
    if asked is None:
        return None
    if callable(asked):
        return lambda: asked
    found: list[Any] = list(asked) if isinstance(asked, (AbstractSet, list, tuple)) else [asked]
    if not all(isinstance(one, type) for one in found):
        raise MisconfigurationTypeError(
            f"{strategy}(auto_wrap_policy={asked!r}) is neither a set of layer classes, such as {{nn.Linear}}, nor a "
            "policy function of torch_xla.distributed.fsdp.wrap."
        )
    classes = set(found)
    return lambda: partial(library("distributed.fsdp.wrap").transformer_auto_wrap_policy, transformer_layer_cls=classes)
