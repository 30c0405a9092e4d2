"""What callbacks that change weights or optimizers ask of a strategy, asked before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # no public base class

from fulmen_fabric.abilities import supports
from fulmen_protocols import MisconfigurationException, OwnsAccumulation, SupportsShardedState

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

__all__ = ["BATCH_NORM", "require_no_engine", "require_whole_model"]


BATCH_NORM = _BatchNorm
"""The base of all layers with running statistics."""


def require_no_engine(trainer: Trainer, callback: object) -> None:
    """Refuse a strategy whose engine was told its optimizers and accumulation once and for all (DeepSpeed).

    Raises:
        MisconfigurationException: the strategy is one.
    """
    if supports(trainer.assembly.strategy, OwnsAccumulation):
        raise MisconfigurationException(
            f"{type(callback).__name__} changes a run while it trains, and the engine of "
            f"strategy={trainer.assembly.strategy_name!r} is set up once. Drop the callback, or use another strategy, "
            "such as 'ddp'."
        )


def require_whole_model(trainer: Trainer, callback: object) -> None:
    """Refuse a strategy that leaves only a part of each weight on a rank.

    Raises:
        MisconfigurationException: the strategy is one.
    """
    require_no_engine(trainer, callback)
    if supports(trainer.assembly.strategy, SupportsShardedState):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs the whole model on every rank, and "
            f"strategy={trainer.assembly.strategy_name!r} shards it. Drop the callback, or use a strategy that does "
            "not shard, such as 'ddp'."
        )
