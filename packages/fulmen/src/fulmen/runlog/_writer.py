"""Appending to a run's log so that a killed process loses at most the line it was writing."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from fulmen.runlog._record import encode
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EventLog"]


class EventLog:
    """An append-only file. Every record is handed to the operating system before ``append`` returns.

    So the death of the process loses nothing but a line that was half written; ``sync`` guards against the death of
    the machine, too. A disk that is full or gone does not stop a run: ``error`` says so, and records are missing.

    Args:
        path: of the file, which is made with its folder; records go behind those of earlier processes.

    Raises:
        MisconfigurationException: this process may not write there.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.error: OSError | None = None
        """The last failure to write; None while all is well."""
        self.lost = 0
        """Records that could not be written."""
        self.synced_at = time.monotonic()
        """``time.monotonic()`` of the last ``sync``."""
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            self.size = os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            raise MisconfigurationException(
                f"the run's log cannot be written at {path!r}: {type(error).__name__}: {error}. Choose a folder for "
                "the logger, or default_root_dir, that this process may write, or pass logger=False: then there is no "
                "log."
            ) from error
        self._torn = self.size > 0 and os.pread(self._file, 1, self.size - 1) != b"\n"

    @property
    def is_open(self) -> bool:
        """Whether records can be appended."""
        return self._file >= 0

    def append(self, record: Mapping[str, object]) -> tuple[int, int]:
        """Write one record; returns where in the file it begins and ends, in bytes."""
        return self.append_line(encode(record))

    def append_line(self, line: bytes) -> tuple[int, int]:
        """``append`` of a record that is encoded already."""
        if self._torn:  # what an interrupted write left of a line must not swallow this one
            line = b"\n" + line
        start = self.size
        try:
            written = os.write(self._file, line)
            while written < len(line):
                self.size, self._torn = self.size + written, True
                line = line[written:]
                written = os.write(self._file, line)
        except OSError as error:
            self.error = error
            self.lost += 1
            return start, start
        self.size += written
        self._torn = False
        return start, self.size

    def sync(self) -> None:
        """Have the file on the disk before returning; a file system that cannot is let be."""
        self.synced_at = time.monotonic()
        try:
            os.fsync(self._file)
        except OSError as error:
            self.error = error

    def close(self) -> None:
        """Sync and close. Calling it twice is allowed."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1
