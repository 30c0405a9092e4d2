"""What a Fabric writes and reads: the user's objects, and what else a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fulmen_fabric import _engine_checkpoints as engine_checkpoints
from fulmen_fabric._loaders import LoaderMaker
from fulmen_fabric._processes import Processes
from fulmen_fabric._setup import Composer
from fulmen_fabric._state import load_into, load_raw_into, to_saved
from fulmen_fabric.abilities import supports
from fulmen_fabric.preemption import PreemptionWatch
from fulmen_fabric.run_state import RunState
from fulmen_fabric.wrappers import FabricModule
from fulmen_protocols import SupportsAsyncSave, SupportsShardedSave

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence
    from datetime import timedelta
    from os import PathLike

    from torch import nn
    from torch.optim import Optimizer

    from fulmen_fabric.assembly import Assembly

__all__ = ["Checkpoints"]


class Checkpoints(Processes):
    """What of a Fabric has to do with files, and with the end of a job."""

    def __init__(self, assembly: Assembly) -> None:
        super().__init__(assembly)
        self._composer = Composer(assembly)
        self._loaders = LoaderMaker(self._world, assembly.strategy)
        self._run_state = RunState(self._world, assembly.precision, self._loaders)

    @property
    def run_state(self) -> RunState:
        """Counters, random state, place in the data: save and load it among your objects to resume exactly."""
        return self._run_state

    def preemption_watch(
        self, *, signals: Sequence[signal.Signals] | None = None, max_time: timedelta | None = None
    ) -> PreemptionWatch:
        """A context that tells your loop when the job is about to end; all ranks stop at the same step.

        Args:
            signals: each is a reason to stop; None: what the scheduler announces the end of a job with, or SIGTERM.
            max_time: after this long it is time to stop, too.
        """
        self._started("preemption_watch")
        return PreemptionWatch(self._world, self._assembly.environment, signals=signals, max_time=max_time)

    def save(
        self,
        path: str | PathLike[str],
        state: Mapping[str, object],
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write modules, optimizers, what else has ``state_dict``, and plain data. Called by every rank.

        Args:
            path: rank 0's counts; a path or URL.
            state: what to save, by name.
            filter: name in ``state`` to a function of (key, value) that says whether that entry is kept.

        Raises:
            MisconfigurationException: ``filter`` names what is not in ``state``.
        """
        self._started("save")
        target = self.broadcast(os.fspath(path))
        if self._composer.checkpoint_owner is not None and any(isinstance(one, FabricModule) for one in state.values()):
            engine_checkpoints.save(self._composer.checkpoint_owner, target, state, filter)
            return
        saved = to_saved(state, filter or {})
        checkpoint_io = self._assembly.checkpoint_io
        if supports(checkpoint_io, SupportsShardedSave):
            checkpoint_io.save_sharded(saved, target)
        # A file only rank 0 writes; of a sharded checkpoint every rank writes its part.
        elif self.is_global_zero or self._composer.is_sharded:
            checkpoint_io.save_checkpoint(saved, target)
        self.barrier("save")

    # Any: the user's own objects.
    def load(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint into ``state``. Called by every rank.

        Whatever has ``load_state_dict`` takes its part; other entries of ``state`` are replaced in that very dict.

        Args:
            path: as ``save`` takes it.
            state: what to restore, by name. None: everything is returned.
            strict: whether every name in ``state``, and every weight, must be in the checkpoint.
            weights_only: False runs code from the file; only for files you trust. None means True.

        Returns:
            The rest: what the checkpoint holds under names that ``state`` has not.

        Raises:
            KeyError: strict, and a name is missing.
        """
        self._started("load")
        self._finish_saves()
        self.barrier("load")
        target, owner = os.fspath(path), self._composer.checkpoint_owner
        if owner is not None and owner.owns_checkpoint(target):
            return engine_checkpoints.load(owner, target, state, strict, weights_only)
        checkpoint = self._assembly.checkpoint_io.load_checkpoint(os.fspath(path), None, weights_only)
        rest = checkpoint if state is None else load_into(state, checkpoint, strict, os.fspath(path))
        self.barrier("load")
        return rest

    def load_raw(
        self,
        path: str | PathLike[str],
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> None:
        """Read a file that holds nothing but the ``state_dict`` of a module or an optimizer. Called by every rank."""
        self._started("load_raw")
        self._finish_saves()
        checkpoint = self._assembly.checkpoint_io.load_checkpoint(os.fspath(path), None, weights_only)
        load_raw_into(obj, checkpoint, strict)

    def _finish_saves(self) -> None:
        """What rank 0 is still writing may be what the others are about to read."""
        checkpoint_io = self._assembly.checkpoint_io
        if supports(checkpoint_io, SupportsAsyncSave):
            checkpoint_io.wait()
            self.barrier("saves")
