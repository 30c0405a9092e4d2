"""``trainer.strategy``: Lightning's names over any Strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from fulmen import _checkpointing
from fulmen._saving import Saving
from fulmen._surface_ranks import RankSurface
from fulmen_fabric import move_data_to_device
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    MisconfigurationException,
    OwnsAccumulation,
    OwnsCheckpoints,
    SupportsLoaderProcessing,
    SupportsShardedSave,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from torch import nn
    from torch.optim import Optimizer

    from fulmen._session import Session
    from fulmen.module import LightningModule
    from fulmen.optimizer import LightningOptimizer, LRSchedulerConfig
    from fulmen.trainer import Trainer
    from fulmen_fabric.steps import Gradients
    from fulmen_protocols import Accelerator, ClusterEnvironment, Precision, ReduceOp

__all__ = ["StrategyFacade"]

T = TypeVar("T")

_OF_THE_ENGINE = ("state_dict", "optimizer_states")
_OPS: dict[str, ReduceOp] = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max"}


class StrategyFacade(RankSurface):
    """What callbacks and integrations read from ``trainer.strategy``. Anything else is asked of the backend itself.

    ``isinstance(trainer.strategy, DDPStrategy)`` holds where the backend is one; ``backend`` is the object itself.
    """

    restore_checkpoint_after_setup = False
    """Whether weights are loaded only after the model is placed."""
    lightning_restore_optimizer = True
    """Whether the Trainer restores optimizers from a checkpoint."""

    def __init__(self, trainer: Trainer) -> None:
        assembly = trainer.assembly
        self.backend = assembly.strategy
        self.checkpoint_io = assembly.checkpoint_io
        self.saving = Saving(assembly.checkpoint_io, trainer.world)
        """Saves that may still be on their way."""
        self._trainer = trainer
        self._world = trainer.world
        self.model: nn.Module | None = None
        """The placed module: wrapped or sharded, as the strategy needs it."""
        self.gradients: Gradients | None = None
        self.wrapped_optimizers: list[LightningOptimizer] = []
        """Those of the running fit, as ``self.optimizers()`` gives them in manual optimization."""

    # Outside code asks isinstance(trainer.strategy, FSDPStrategy), and must not be told no.
    @property  # type: ignore[misc]  # object's can be set too, which nobody does to a strategy
    def __class__(self) -> type[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]  # the same
        return type(self.backend)

    def __reduce__(self) -> tuple[object, tuple[()], dict[str, Any]]:
        return _empty, (), dict(self.__dict__)  # pickle's own way refuses an object whose __class__ is not its type

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the last call, as the user wrote it; None before the first."""
        return self._trainer.lightning_module

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the running fit. Settable, as ``Trainer.optimizers``."""
        return self._trainer.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        self._trainer.optimizers = optimizers

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers of the running fit."""
        return self._trainer.lr_scheduler_configs

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator in use."""
        return self._trainer.assembly.accelerator

    @property
    def precision_plugin(self) -> Precision:
        """The precision in use."""
        return self._trainer.assembly.precision

    @property
    def cluster_environment(self) -> ClusterEnvironment:
        """What tells this process its ranks."""
        return self._trainer.assembly.environment

    @property
    def parallel_devices(self) -> list[torch.device]:
        """This node's devices, one for each of its processes."""
        return list(self._trainer.assembly.devices)

    @property
    def strategy_name(self) -> str:
        """The backend's registered name, else its class's."""
        return self._trainer.assembly.strategy_name

    @property
    def launcher(self) -> Any:
        """What starts the processes: its name, where the backend has one. None for one process."""
        return getattr(self.backend, "launcher", None)

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self._trainer.assembly.num_nodes

    @property
    def num_processes(self) -> int:
        """Processes of this node."""
        return len(self._trainer.assembly.devices)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """``num_replicas`` and ``rank`` for a sampler of one's own."""
        return self._trainer.distributed_sampler_kwargs

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Whether the strategy's engine counts accumulation itself."""
        return supports(self.backend, OwnsAccumulation)

    @property
    def _lightning_optimizers(self) -> list[LightningOptimizer]:
        """``wrapped_optimizers`` under the name that outside code reads."""
        return self.wrapped_optimizers

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return self._world.device

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

    def batch_to_device(self, batch: T, device: torch.device | None = None, dataloader_idx: int = 0) -> T:
        """``batch`` on ``device`` (None: this process's), moved as the Trainer moves one; hooks are not called."""
        return move_data_to_device(batch, self.root_device if device is None else device)

    def process_dataloader(self, dataloader: Any) -> Any:
        """``dataloader`` as the backend feeds it to the device; most leave it as it is."""
        return (
            self.backend.process_loader(dataloader) if supports(self.backend, SupportsLoaderProcessing) else dataloader
        )

    def lightning_module_state_dict(self) -> Mapping[str, Any]:
        """The weights as a checkpoint holds them. Every rank must call it.

        Raises:
            MisconfigurationException: no model is attached yet.
        """
        session = self._session("lightning_module_state_dict()")
        return _checkpointing.module_state(session, full=_checkpointing.is_full(session))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of one of ``optimizers``, or of its wrapper, as a checkpoint holds it. Every rank must call it.

        Raises:
            MisconfigurationException: no model is attached yet, or its fit does not train with ``optimizer``.
        """
        session = self._session("optimizer_state()")
        plain = getattr(optimizer, "optimizer", optimizer)
        for known in session.optimizers:
            if known is plain or known is optimizer:
                return _checkpointing.optimizer_state(session, known, full=_checkpointing.is_full(session))
        raise MisconfigurationException(
            f"optimizer_state({type(optimizer).__name__}): this fit trains with "
            f"{', '.join(type(each).__name__ for each in session.optimizers) or 'no optimizer'}, and it is none of "
            "these objects. Pass one of trainer.optimizers."
        )

    def _session(self, asked: str) -> Session:
        session = self._trainer._session  # pyright: ignore[reportPrivateUsage]  # ours
        if session is None:
            raise MisconfigurationException(
                f"trainer.strategy.{asked} needs a model, and this trainer has none yet. Call fit, validate, test or "
                "predict first."
            )
        return session

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

    def load_checkpoint(self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file that the checkpoint IO wrote, to the CPU. Code from it runs only with ``weights_only=False``.

        Raises:
            MisconfigurationException: the strategy's engine writes its checkpoints itself, and reads them in a run.
        """
        if supports(self.backend, OwnsCheckpoints):
            raise MisconfigurationException(
                f"load_checkpoint({str(checkpoint_path)!r}): the engine of {type(self.backend).__name__} reads its "
                "checkpoints into the model itself. Give the path to fit(..., ckpt_path=...)."
            )
        return dict(self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only))

    def remove_checkpoint(self, filepath: str | PathLike[str]) -> None:
        """Delete on rank 0."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.backend, name)


def _empty() -> StrategyFacade:
    """What unpickling fills."""
    return object.__new__(StrategyFacade)
