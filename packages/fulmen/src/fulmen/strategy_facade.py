"""``trainer.strategy``: Lightning's names over any Strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from fulmen._saving import Saving
from fulmen_fabric.abilities import supports
from fulmen_protocols import MisconfigurationException, OwnsCheckpoints, SupportsShardedSave

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from torch import nn
    from torch.optim import Optimizer

    from fulmen.optimizer import LightningOptimizer
    from fulmen_fabric import World
    from fulmen_fabric.steps import Gradients
    from fulmen_protocols import CheckpointIO, ReduceOp, Strategy

__all__ = ["StrategyFacade"]

T = TypeVar("T")

_OF_THE_ENGINE = ("state_dict", "optimizer_states")
_OPS: dict[str, ReduceOp] = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max"}


class StrategyFacade:
    """What callbacks and integrations read from ``trainer.strategy``. Anything else is asked of the backend itself."""

    def __init__(self, backend: Strategy, world: World, checkpoint_io: CheckpointIO) -> None:
        self.backend = backend
        self.checkpoint_io = checkpoint_io
        self.saving = Saving(checkpoint_io, world)
        """Saves that may still be on their way."""
        self._world = world
        self.model: nn.Module | None = None
        """The placed module: wrapped or sharded, as the strategy needs it."""
        self.gradients: Gradients | None = None
        self.wrapped_optimizers: list[LightningOptimizer] = []
        """Those of the running fit, as ``self.optimizers()`` gives them in manual optimization."""

    @property
    def _lightning_optimizers(self) -> list[LightningOptimizer]:
        """``wrapped_optimizers`` under the name that outside code reads."""
        return self.wrapped_optimizers

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return self._world.device

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self._world.is_global_zero

    @property
    def global_rank(self) -> int:
        """Index among all processes."""
        return self._world.rank

    @property
    def local_rank(self) -> int:
        """Index among this node's processes."""
        return self._world.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self._world.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world.world_size

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank."""
        self._world.collectives.barrier(name or "")

    def broadcast(self, obj: T, src: int = 0) -> T:
        """A picklable object of rank ``src``."""
        return self._world.collectives.broadcast_object(obj, src)

    def reduce(self, tensor: Tensor | float, group: object = None, reduce_op: str = "mean") -> Tensor:
        """Combine a value over all ranks; ``reduce_op`` is mean (avg), sum, min or max.

        Raises:
            ValueError: another ``reduce_op``, or a ``group`` of only some ranks.
        """
        op = _OPS.get(reduce_op)
        if op is None:
            raise ValueError(f"reduce_op={reduce_op!r} must be one of {', '.join(_OPS)}.")
        if group is not None:
            raise ValueError(
                f"group={group!r}: only all ranks together can reduce here; use torch.distributed directly."
            )
        value = tensor if isinstance(tensor, Tensor) else torch.tensor(tensor, device=self.root_device)
        return self._world.collectives.all_reduce(value, op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # Lightning's name
        """Whether ``decision`` holds on every rank, or, with ``all=False``, on any. Reads a device value."""
        if self._world.world_size == 1:
            return decision
        value = torch.tensor(int(decision), device=self.root_device)
        return bool(self._world.collectives.all_reduce(value, "min" if all else "max").item())

    def all_gather(self, tensor: Tensor, group: object = None, sync_grads: bool = False) -> Tensor:
        """``tensor`` of every rank, stacked; unchanged in a run of one process."""
        if group is not None:
            raise ValueError(
                f"group={group!r}: only all ranks together can gather here; use torch.distributed directly."
            )
        if self._world.world_size == 1:
            return tensor
        return self._world.collectives.all_gather(tensor, differentiable=sync_grads)

    def clip_gradients(self, optimizer: Optimizer, value: float, algorithm: Literal["norm", "value"]) -> Tensor | None:
        """Clip in place; what ``LightningModule.clip_gradients`` calls. Returns the norm before, for ``"norm"``."""
        if self.gradients is None:
            raise MisconfigurationException("gradients can be clipped during fit only.")
        return self.gradients.clip(optimizer, value, algorithm)

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        filepath: str | PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write on rank 0, or on every rank where the checkpoint IO or the strategy is for that. Called by every rank.

        Raises:
            MisconfigurationException: ``storage_options`` for a checkpoint that the strategy's engine writes.
        """
        if supports(self.backend, OwnsCheckpoints) and "optimizer_states" in checkpoint:
            if storage_options is not None:
                raise MisconfigurationException(
                    f"save_checkpoint got storage_options={dict(storage_options)!r}, but the engine of "
                    f"{type(self.backend).__name__} writes its checkpoints itself, to a folder. Leave them out."
                )
            if self.model is None:
                raise MisconfigurationException("there is no model yet: call fit first.")
            rest = {name: value for name, value in checkpoint.items() if name not in _OF_THE_ENGINE}
            self.backend.save_checkpoint(self.model, rest, str(filepath))
            return
        if supports(self.checkpoint_io, SupportsShardedSave):
            self.checkpoint_io.save_sharded(checkpoint, filepath, storage_options)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: str | PathLike[str]) -> None:
        """Delete on rank 0."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.backend, name)
