"""Finding the newest checkpoint that is whole."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fulmen_checkpoint.names import is_staging
from fulmen_checkpoint.storage import FsspecStorage
from fulmen_checkpoint.torch_io import TorchCheckpointIO
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fulmen_protocols.checkpoint_io import SupportsVerification
    from fulmen_protocols.storage import Storage

__all__ = ["Found", "find_last", "list_checkpoints", "newest_whole"]


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search."""

    path: str | None
    """The newest whole checkpoint; None when there is none."""
    skipped: tuple[tuple[str, str], ...]
    """Newer candidates that were passed over, newest first: path and what is wrong with it."""

    def report(self) -> str:
        """What was skipped and why, one line each; empty when the newest was whole."""
        return "\n".join(f"skipped {path}: {reason}" for path, reason in self.skipped)


def list_checkpoints(
    folder: str | os.PathLike[str], pattern: str = "*.ckpt", storage: Storage | None = None
) -> list[str]:
    """Checkpoints directly in ``folder`` whose name matches ``pattern``, newest first. Nothing is opened.

    Of two written in the same instant, the one with the greater numbers in its name is the newer.
    """
    where = FsspecStorage() if storage is None else storage
    names = [path for path in where.list(os.fspath(folder)) if fnmatchcase(_name(path), pattern)]
    return _newest_first(names, where)


def find_last(
    folder: str | os.PathLike[str],
    pattern: str = "*.ckpt",
    *,
    io: SupportsVerification | None = None,
    storage: Storage | None = None,
) -> Found:
    """The newest whole checkpoint directly in ``folder``; damaged newer ones are passed over and reported."""
    where = FsspecStorage() if storage is None else storage
    checker = TorchCheckpointIO(where) if io is None else io
    return _first_whole(list_checkpoints(folder, pattern, where), checker)


def newest_whole(
    candidates: Iterable[str], *, io: SupportsVerification | None = None, storage: Storage | None = None
) -> Found:
    """Like ``find_last`` among ``candidates`` from anywhere; those that do not exist are not mentioned."""
    where = FsspecStorage() if storage is None else storage
    checker = TorchCheckpointIO(where) if io is None else io
    return _first_whole(_newest_first(candidates, where), checker)


def _first_whole(paths: Iterable[str], checker: SupportsVerification) -> Found:
    skipped: list[tuple[str, str]] = []
    for path in paths:
        try:
            checker.verify_checkpoint(path)
        except (CheckpointError, ValueError, OSError) as error:  # a vendor's checker raises builtins
            skipped.append((path, str(error)))
        else:
            return Found(path, tuple(skipped))
    return Found(None, tuple(skipped))


def _newest_first(paths: Iterable[str], storage: Storage) -> list[str]:
    dated: list[tuple[float, list[tuple[str, int]], str]] = []
    for path in set(paths):
        if is_staging(path):
            continue
        try:
            when = storage.modified(path)
        except (
            FileNotFoundError,
            IsADirectoryError,
        ):  # deleted meanwhile, or a folder without a date
            if not storage.exists(path):
                continue
            when = 0.0
        dated.append((when, _natural(_name(path)), path))
    return [path for _, _, path in sorted(dated, reverse=True)]


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
