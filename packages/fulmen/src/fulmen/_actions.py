"""What users call on a Trainer beside its four calls: save, print, make modules, explain, plan."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fulmen import _checkpointing
from fulmen._explain import explain_run
from fulmen._surface import TrainerSurface
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from fulmen._stopping import Stopping
    from fulmen.datamodule import LightningDataModule
    from fulmen.memory_plan import MemoryPlan
    from fulmen.module import LightningModule

__all__ = ["TrainerActions"]


class TrainerActions(TrainerSurface):
    """Methods that need nothing but what a Trainer shows."""

    _stopping: Stopping

    @property
    def received_sigterm(self) -> bool:
        """Whether this run was asked to end by SIGTERM, here or on another rank."""
        return self._stopping.received_sigterm

    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write a checkpoint. Every rank must call it; rank 0 writes.

        Args:
            filepath: a path or any fsspec URL.
            weights_only: leave out optimizers, schedulers and callbacks.
            storage_options: for the storage behind the URL.

        Raises:
            MisconfigurationException: no model is attached yet.
        """
        if self._session is None:
            raise MisconfigurationException(
                "save_checkpoint() needs a model, and this trainer has none yet. "
                "Call fit, validate, test or predict first."
            )
        if self.world.runs_apart and not weights_only:
            raise MisconfigurationException(
                f"save_checkpoint({os.fspath(filepath)!r}): strategy {self.assembly.strategy_name!r} had its "
                "optimizers in processes that have ended. Let ModelCheckpoint save during the fit, or pass "
                "weights_only=True."
            )
        save = self._session.measuring.action("save_checkpoint", _checkpointing.save)
        with self._reporter.within("checkpoints"):
            save(self._as_trainer(), self._session, os.fspath(filepath), bool(weights_only), storage_options)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on local rank 0, without breaking the progress bar."""
        if self.world.local_rank != 0:
            return
        bar = self.progress_bar_callback
        if bar is not None and hasattr(bar, "print"):
            bar.print(*args, **kwargs)
        else:
            print(*args, **kwargs)

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Within the block new modules are created where the strategy wants them, in the precision's dtype.

        Starts the run's processes. With ``empty_init`` the values are left undefined, for a checkpoint to fill.
        """
        assembly = self.assembly
        if self.world.runs_apart:  # the ranks get the module as it is made here
            with assembly.precision.init_context():
                yield
            return
        self.world.launch(_nothing)
        with assembly.strategy.module_context(empty=bool(empty_init)), assembly.precision.init_context():
            yield

    def plan(
        self,
        model: LightningModule | Callable[[], LightningModule],
        *,
        batch: object = None,
        batch_size: int | None = None,
        datamodule: LightningDataModule | None = None,
        device: str = "cuda",
    ) -> MemoryPlan:
        """What one rank of a fit of ``model`` would need in memory; needs neither the devices nor the other ranks.

        The strategy, precision and optimizers of the run take one training step on tensors that have a shape and no
        values. Not counted: the device's context, libraries' workspaces, fragmentation, and what compiling changes.

        Args:
            model: a LightningModule, which is left as it is, or its class or another callable that makes one: then
                not even the weights need memory.
            batch: of one rank, or its dtypes and shapes, as in ``"int64[16,1024]"``, ``"float32[8,3,32,32],int64[8]"``
                or ``"x=float32[8,4],y=int64[8]"``. None: the first of the training loader, if there is one;
                otherwise ``example_input_array`` goes through ``forward``.
            batch_size: samples per rank in place of the batch's own.
            datamodule: whose training loader supplies the batch.
            device: ``"cuda"`` or ``"cpu"``, for whose memory the plan is made. Devices are counted by the Trainer's
                arguments; on a machine without GPUs write ``Trainer(accelerator="cpu", devices=8)``.

        Raises:
            MisconfigurationException: no batch is known, the step reads values, or the strategy cannot be planned.
            BackendUnavailable: this version of torch lacks what plans need.
        """
        from fulmen.memory_plan.planner import plan_memory  # torch.distributed.tensor: a second that no run needs

        return plan_memory(
            self._as_trainer(), model, batch=batch, batch_size=batch_size, datamodule=datamodule, device=device
        )

    def explain(self, model: LightningModule | None = None) -> str:
        """Print, and return, what a fit does in order, and which distribution supplies each part."""
        text = explain_run(self._as_trainer(), model)
        print(text)
        return text


def _nothing() -> None:
    """What the launcher runs: this process goes on by itself."""
