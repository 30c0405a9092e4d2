"""OnExceptionCheckpoint: saves when a run fails, and lets the next fit go on from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen import _files
from fulmen.callbacks._failing_together import all_ranks_fail
from fulmen.callbacks.checkpoint import Checkpoint
from fulmen.exceptions import PreemptedException
from fulmen_fabric import rank_zero_info
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from os import PathLike

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["OnExceptionCheckpoint"]


class OnExceptionCheckpoint(Checkpoint):
    """Save a checkpoint when an exception ends a fit, Ctrl-C and SIGTERM included; delete it when a fit ends well.

    While this callback is there, ``trainer.fit(ckpt_path=None)`` means ``ckpt_path="last"``: the newest of this
    callback's file and the ``last`` files of ``ModelCheckpoint``; without any it begins anew. So a script that is
    simply started again goes on where it failed.

    On several ranks it saves if all fail at the same step (a signal, an error that all meet). If one fails alone, the
    exception's notes say that nothing was saved.

    Args:
        dirpath: folder or URL. There is no default: the run may fail before loggers have one.
        filename: without extension; an older file is overwritten.

    Raises:
        MisconfigurationException: ``filename`` is empty.
    """

    FILE_EXTENSION = ".ckpt"
    save_on_exception = True

    def __init__(self, dirpath: str | PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise MisconfigurationException(
                f"OnExceptionCheckpoint(filename={filename!r}) is empty. Give a name without extension."
            )
        self.dirpath = dirpath
        self.filename = filename
        self._failures = 0

    @property
    def ckpt_path(self) -> str:
        """Where the checkpoint is saved."""
        return _files.join(str(self.dirpath), self.filename + self.FILE_EXTENSION)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless nothing has been trained that would be lost."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if isinstance(exception, PreemptedException):  # saved already
            return
        self._failures += 1
        if not all_ranks_fail(trainer, f"OnExceptionCheckpoint({self.filename!r}) #{self._failures}", exception):
            return
        trainer.save_checkpoint(self.ckpt_path)
        rank_zero_info(f"saved {self.ckpt_path} because of {type(exception).__name__}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Delete the checkpoint of an earlier failure when a fit has ended well: it has served its purpose."""
        if stage == "fit" and trainer.is_global_zero and _files.exists(self.ckpt_path):
            trainer.strategy.remove_checkpoint(self.ckpt_path)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """The file that ``ckpt_path="last"`` may mean."""
        return {self.ckpt_path} if _files.exists(self.ckpt_path) else set()
