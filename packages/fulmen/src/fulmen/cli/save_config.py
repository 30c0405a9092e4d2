"""SaveConfigCallback: what a run was started with, in a file beside its results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen import _files
from fulmen.callbacks.callback import Callback
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from fulmen._jsonargparse import Namespace
    from fulmen.callbacks.callback import Stage
    from fulmen.cli.parser import LightningArgumentParser
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["SaveConfigCallback"]


class SaveConfigCallback(Callback):
    """Writes the configuration into the run's folder when the run begins, on rank 0.

    Args:
        parser: the parser that read it.
        config: what it read.
        config_filename: the file's name in ``trainer.log_dir``.
        overwrite: whether a file of an earlier run may be replaced.
        multifile: whether what came from several files is written as several files.
        save_to_log_dir: False where a subclass's ``save_config`` stores it elsewhere instead.

    Raises:
        MisconfigurationException: ``save_to_log_dir=False``, and ``save_config`` is not overridden.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        self.parser = parser
        self.config = config
        self.config_filename = config_filename
        self.overwrite = overwrite
        self.multifile = multifile
        self.save_to_log_dir = save_to_log_dir
        self.already_saved = False
        if not save_to_log_dir and type(self).save_config is SaveConfigCallback.save_config:
            raise MisconfigurationException(
                f"{type(self).__name__} got save_to_log_dir=False, and its save_config does nothing, so that the "
                "configuration would be lost. Override save_config, or leave save_to_log_dir=True."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Write the file, once per object.

        Raises:
            RuntimeError: there is one already, on every rank.
        """
        if self.already_saved:
            return
        if self.save_to_log_dir:
            folder = trainer.log_dir
            if folder is None:
                raise MisconfigurationException(
                    f"{type(self).__name__} has no folder to write {self.config_filename!r} to: the logger has no "
                    "log_dir. Give the Trainer a logger with one, or use save_config_callback=None."
                )
            path = _files.join(folder, self.config_filename)
            taken = not self.overwrite and trainer.is_global_zero and _files.exists(path)
            if trainer.strategy.broadcast(taken):
                raise RuntimeError(
                    f"{type(self).__name__} found {path!r}, the configuration of an earlier run. Choose another "
                    "folder, delete the file, or pass save_config_kwargs={'overwrite': True} to the command line's "
                    "class (save_config_callback=None saves none)."
                )
            if trainer.is_global_zero:
                _files.make_folder(folder)
                self.parser.save(
                    self.config, path, skip_unset=False, overwrite=self.overwrite, multifile=self.multifile
                )
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Override to store the configuration elsewhere too. Only rank 0 calls it: no collective may run in it."""
