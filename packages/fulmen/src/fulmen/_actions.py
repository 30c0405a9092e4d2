"""What users call on a Trainer beside its four calls: save, print, make modules, explain."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fulmen import _checkpointing
from fulmen._explain import explain_run
from fulmen._surface import TrainerSurface
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from fulmen._stopping import Stopping
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
        self.world.launch(lambda: None)  # this process goes on by itself
        assembly = self.assembly
        with assembly.strategy.module_context(empty=bool(empty_init)), assembly.precision.init_context():
            yield

    def explain(self, model: LightningModule | None = None) -> str:
        """Print, and return, what a fit does in order, and which distribution supplies each part."""
        text = explain_run(self._as_trainer(), model)
        print(text)
        return text
