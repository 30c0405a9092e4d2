"""Retention: deletes old checkpoints, but only those this run wrote, and never the one it resumed from."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from fulmen_checkpoint.storage import FsspecStorage, local_path
from fulmen_protocols.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fulmen_protocols.storage import Storage

__all__ = ["Journal", "Retention"]


class Journal:
    """Which checkpoints one run wrote and has not deleted, and which it resumed from.

    Args:
        path: a small JSON file that outlives the process (a local path or a URL), so that the same run, started again,
            still knows its files; None keeps the journal in memory. Give each run its own.
        storage: where ``path`` lives.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, storage: Storage | None = None) -> None:
        self.path = None if path is None else os.fspath(path)
        self._storage: Storage = FsspecStorage() if storage is None else storage
        self._written: dict[str, None] = {}
        self._resumed: dict[str, None] = {}
        if self.path is not None:
            self._read(self.path)

    @property
    def written(self) -> list[str]:
        """What the run wrote and has not deleted, oldest first."""
        return list(self._written)

    @property
    def resumed(self) -> list[str]:
        """What the run resumed from, oldest first."""
        return list(self._resumed)

    def add_written(self, path: str) -> None:
        """Note a checkpoint that is complete; writing it again makes it the newest."""
        self._written.pop(path, None)
        self._written[path] = None
        self._write()

    def add_resumed(self, path: str) -> None:
        """Note a checkpoint that the run started from."""
        if path not in self._resumed:
            self._resumed[path] = None
            self._write()

    def forget(self, path: str) -> None:
        """Note that a checkpoint was deleted."""
        if path in self._written:
            del self._written[path]
            self._write()

    def _read(self, path: str) -> None:
        try:
            with self._storage.open_read(path) as stream:
                text = stream.read()
        except FileNotFoundError:
            return
        try:
            known = json.loads(text)
            self._written = dict.fromkeys(_strings(known["written"]))
            self._resumed = dict.fromkeys(_strings(known["resumed"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointCorrupt(
                f"the journal {path!r} is not one that fulmen wrote: {error!r}. Delete it; "
                "checkpoints it named will then be kept for good."
            ) from error

    def _write(self) -> None:
        if self.path is None:
            return
        text = json.dumps({"written": self.written, "resumed": self.resumed}, indent=1)
        with self._storage.write_atomic(self.path) as stream:
            stream.write(text.encode())


class Retention:
    """Deletes checkpoints of one run.

    Args:
        journal: what the run wrote; a new one in memory by default.
        storage: where the checkpoints live.
    """

    def __init__(self, journal: Journal | None = None, storage: Storage | None = None) -> None:
        self.journal = Journal() if journal is None else journal
        self._storage: Storage = FsspecStorage() if storage is None else storage

    def wrote(self, path: str | os.PathLike[str]) -> None:
        """Say that this run has completed a checkpoint at ``path``. Call it before pruning others."""
        self.journal.add_written(_identity(path))

    def resumed_from(self, path: str | os.PathLike[str]) -> None:
        """Say that this run started from ``path``, which is then never deleted, even if this run wrote it.

        Of a link (``last.ckpt``), what it points to now is kept too.
        """
        self.journal.add_resumed(_identity(path))
        local = local_path(os.fspath(path))
        if local is not None and os.path.islink(local):
            self.journal.add_resumed(os.path.realpath(local))

    def may_remove(self, path: str | os.PathLike[str]) -> bool:
        """Whether this run wrote ``path`` and did not resume from it or from something inside it."""
        asked = _identity(path)
        return asked in self.journal.written and not any(
            kept == asked or kept.startswith(asked + "/") or asked.startswith(kept + "/")
            for kept in self.journal.resumed
        )

    def remove(self, path: str | os.PathLike[str]) -> bool:
        """Delete the checkpoint if this run may; returns whether it did. Removing what is gone already is allowed."""
        if not self.may_remove(path):
            return False
        # In this order: dying in between leaves a name in the journal, not a file that nobody owns.
        self._storage.remove(os.fspath(path))
        self.journal.forget(_identity(path))
        return True

    def keep_newest(self, count: int) -> list[str]:
        """Delete all but the ``count`` newest checkpoints that this run may delete; returns what was deleted.

        Raises:
            ValueError: ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"keep_newest(count={count!r}): give 0 or more")
        ours = [path for path in self.journal.written if self.may_remove(path)]
        return [path for path in ours[: max(0, len(ours) - count)] if self.remove(path)]


def _identity(path: str | os.PathLike[str]) -> str:
    """One name per place: two spellings of a path, or a link in its folders, must not hide what is protected."""
    text = os.fspath(path)
    local = local_path(text)
    if local is None:
        scheme, _, rest = text.partition("://")
        return f"{scheme}://{rest.rstrip('/')}"
    folder, name = os.path.split(local)
    return os.path.join(os.path.realpath(folder), name)


def _strings(values: Iterable[object]) -> list[str]:
    checked: list[str] = []
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no path")
        checked.append(value)
    return checked
