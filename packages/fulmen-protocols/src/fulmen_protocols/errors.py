"""The one error tree of fulmen. Every class is also a builtin, so that nobody has to import ours to catch it.

    FulmenError(Exception)
    ├── MisconfigurationException(ValueError)     arguments that contradict each other or are out of range
    │   ├── MisconfigurationRuntimeError(RuntimeError)  what Lightning raises a RuntimeError for
    │   └── MisconfigurationTypeError(TypeError)  an argument of the wrong type
    ├── BackendNotFound(LookupError)              no installed backend has that name
    ├── BackendUnavailable(RuntimeError)          installed, but it cannot run on this machine
    ├── BrokenPlugin(ImportError)                 a third-party backend failed while it was imported
    ├── MissingPackage(ImportError)               an optional library is not installed
    ├── NotConforming(TypeError)                  an object does not satisfy the protocol it is used for
    ├── CheckpointError(RuntimeError)
    │   ├── CheckpointNotFound(FileNotFoundError)
    │   ├── CheckpointCorrupt(ValueError)         the bytes are not those that were written
    │   └── CheckpointUnsafe(ValueError)          it holds objects that only code from the file could rebuild
    ├── ExportError(RuntimeError)                 a module cannot be exported, or its artifact computes something else
    └── RankFailure(RuntimeError)                 another process of the run failed first

A message says what was asked, what was found and what to do, in that order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BackendNotFound",
    "BackendUnavailable",
    "BrokenPlugin",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointNotFound",
    "CheckpointUnsafe",
    "ExportError",
    "FulmenError",
    "MisconfigurationException",
    "MisconfigurationRuntimeError",
    "MisconfigurationTypeError",
    "MissingPackage",
    "NotConforming",
    "RankFailure",
    "did_you_mean",
]


class FulmenError(Exception):
    """Base of every error that fulmen itself raises."""


class MisconfigurationException(FulmenError, ValueError):
    """Arguments contradict each other or lie outside the allowed values. The name is Lightning's."""


class MisconfigurationRuntimeError(MisconfigurationException, RuntimeError):
    """A contradiction that Lightning reports as a ``RuntimeError``, so that code which expects one finds it."""


class MisconfigurationTypeError(MisconfigurationException, TypeError):
    """An argument has the wrong type."""


class BackendNotFound(FulmenError, LookupError):
    """No installed backend of a seam has the requested name."""


class BackendUnavailable(FulmenError, RuntimeError):
    """A backend is installed but cannot run on this machine."""


class BrokenPlugin(FulmenError, ImportError):
    """A backend's module raised while it was imported."""


class MissingPackage(FulmenError, ImportError):
    """An optional library is not installed; the message holds the exact ``pip install``."""


class NotConforming(FulmenError, TypeError):
    """An object lacks members of the protocol it is used for."""


class CheckpointError(FulmenError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at that place."""

    # FileNotFoundError formats (errno, text) pairs; ours is always one sentence.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CheckpointCorrupt(CheckpointError, ValueError):
    """The checkpoint's bytes differ from those that were written."""


class CheckpointUnsafe(CheckpointError, ValueError):
    """The checkpoint holds objects that could be rebuilt only by running code from the file."""


class ExportError(FulmenError, RuntimeError):
    """A module cannot be exported to a format, or the artifact does not compute what the module does."""


class RankFailure(FulmenError, RuntimeError):
    """Another process of the run failed first; the message carries its rank and traceback."""


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``known``, or an empty string when none is close.

    Capitals do not count.
    """
    from difflib import get_close_matches  # only an error needs it

    by_lower = {name.lower(): name for name in sorted(known)}
    close = get_close_matches(asked.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""
