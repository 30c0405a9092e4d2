"""Profiler: the class to derive one's own profiler from; it knows where the report goes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fulmen import _files
from fulmen_fabric import rank_zero_info

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from os import PathLike

__all__ = ["Profiler"]

# What some file system refuses in a name.
_UNSAFE = re.compile(r'[\\/:*?"<>|\n\r\t]')


class Profiler(ABC):
    """Measures named actions. A subclass defines ``start`` and ``stop``, and ``summary`` for a report.

    Any object with the members of ``fulmen_protocols.Profiler`` serves as well.

    Args:
        dirpath: folder of the report, a path or URL; None: the Trainer's ``log_dir``.
        filename: part of the report's name, ``{stage}-{filename}-{local rank}.txt``. None: local rank 0 logs it.
    """

    def __init__(self, dirpath: str | PathLike[str] | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._stage: str | None = None
        self._local_rank: int | None = None

    @abstractmethod
    def start(self, action_name: str) -> None:
        """Begin to measure an action."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """End to measure an action."""

    @contextmanager
    def profile(self, action_name: str) -> Generator[str, None, None]:
        """Measure the block as ``action_name``."""
        self.start(action_name)  # outside of try: what did not start, because it runs already, is not ours to stop
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def summary(self) -> str:
        """The report as text; an empty one is not written."""
        return ""

    def describe(self) -> None:
        """Append the report to its file, or log it where there is none."""
        text = self.summary()
        if not text:
            return
        if self.filename and self.dirpath:
            self._append(_files.join(str(self.dirpath), self._prepare_filename()), text)
        else:
            self._rank_zero_info(text)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Learn what is about to run, on which rank of this node, and where reports go unless told otherwise."""
        self._stage = stage
        self._local_rank = local_rank
        self.dirpath = self.dirpath or log_dir

    def teardown(self, stage: str | None) -> None:  # noqa: B027  need not be overridden
        """Let go of what was opened. Called after the report, and when a run fails."""

    @property
    def local_rank(self) -> int:
        """Index of this process on its node; 0 outside of a run."""
        return 0 if self._local_rank is None else self._local_rank

    def _rank_zero_info(self, text: str) -> None:
        if self.local_rank == 0:
            rank_zero_info("%s", text)

    def _prepare_filename(self, action_name: str | None = None, extension: str = ".txt") -> str:
        """``{stage}-{filename}-{local rank}-{action}``, as far as they are known, safe as a file name everywhere."""
        rank = None if self._local_rank is None else str(self._local_rank)
        known = [part for part in (self._stage, self.filename, rank, action_name) if part]
        name = re.sub("_+", "_", _UNSAFE.sub("_", "-".join(known))).strip()
        return (name or "profile") + extension

    def _stats_to_str(self, stats: Mapping[str, str]) -> str:
        """One report of a text for each action."""
        rank = "" if self._local_rank is None else f" rank: {self._local_rank}"
        parts = [f"{self._title()}Profiler Report"]
        for action, text in stats.items():
            parts += [f"Profile stats for: {action}{rank}", text]
        return "\n".join(parts)

    def _title(self) -> str:
        return "" if self._stage is None else f"{self._stage.upper()} "

    @staticmethod
    def _append(path: str, text: str) -> None:
        _files.make_folder(_files.parent(path))
        if _files.is_local(path):
            with _files.open_text(path, "a") as file:
                file.write(text + "\n")
            return
        before = ""
        if _files.exists(path):  # object stores cannot append
            with _files.open_text(path) as file:
                before = file.read()
        with _files.open_text(path, "w") as file:
            file.write(before + text + "\n")
