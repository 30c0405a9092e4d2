"""What loggers have in common that write the files of a run into a folder of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fulmen_loggers._everybodys import Everybodys
from fulmen_loggers._folder import RunFolder
from fulmen_loggers._guard import Guard
from fulmen_loggers._hparams import FILE as HPARAMS_FILE
from fulmen_loggers._hparams import Hyperparameters
from fulmen_loggers._values import JOIN_CHAR, prefixed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FolderLogger"]


class FolderLogger(Everybodys):
    """The run's folder and hyperparameters. What is written there besides, and when, is each logger's own.

    Args:
        kind: name of the logger, for messages.
        save_dir: root folder, local or an fsspec URL.
        name: folder of the experiment below it; empty or None for none.
        version: which run: a number, a text used as the folder's name, or None for the next free number.
        prefix: put before the names of metrics, with a dash.
    """

    LOGGER_JOIN_CHAR = JOIN_CHAR
    NAME_HPARAMS_FILE = HPARAMS_FILE

    def __init__(
        self, kind: str, save_dir: str | os.PathLike[str], name: str | None, version: int | str | None, prefix: str
    ) -> None:
        self._folder = RunFolder(kind, save_dir, name, version)
        self._prefix = prefixed(prefix, self.LOGGER_JOIN_CHAR)
        self._hparams = Hyperparameters()
        self._guard = Guard()
        self._deliver: Callable[[], object] | None = None

    @property
    def name(self) -> str | None:
        """Name of the experiment."""
        return self._folder.name

    @property
    def version(self) -> int | str:
        """Which run of the experiment this is. Setting it, before the first use, joins the run of another process."""
        return self._folder.version

    @version.setter
    def version(self, version: int | str) -> None:
        self._folder.version = version

    @property
    def save_dir(self) -> str:
        """The root folder that the user chose."""
        return self._folder.save_dir

    @property
    def root_dir(self) -> str:
        """The folder of all runs of the experiment."""
        return self._folder.root

    @property
    def hparams(self) -> dict[str, object]:
        """All hyperparameters logged so far."""
        return self._hparams.values

    def waiting_rows(self, deliver: Callable[[], object] | None) -> None:
        """Call ``deliver`` before ``save`` writes: a run hands over its rows a little later than it logs them."""
        self._deliver = deliver

    def _take_waiting_rows(self) -> None:
        if self._deliver is not None:
            self._deliver()

    def reopen_options(self) -> dict[str, object]:
        """Arguments with which another process goes on with this run."""
        return {
            "save_dir": self.save_dir if self._folder.is_remote else os.path.abspath(self.save_dir),
            "name": self.name,
            "version": self.version,
            "prefix": self._prefix.removesuffix(self.LOGGER_JOIN_CHAR),
        }
