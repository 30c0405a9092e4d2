"""Which checkpoints a logger has yet to upload, and what it says about them."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from fulmen_loggers._values import simplify
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Checkpoint", "Uploads"]

_DESCRIBED = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file to upload."""

    path: str
    is_best: bool
    metadata: dict[str, object]

    @property
    def aliases(self) -> list[str]:
        """``latest``, and ``best`` where it is."""
        return ["latest", "best"] if self.is_best else ["latest"]


class Uploads:
    """The checkpoints of a run that ``log_model`` asks for, each uploaded once.

    Args:
        logger: class name, for messages.
        log_model: False: none; True: what is there at the end of a run that succeeded; ``"all"``: each as it is saved.
        send: uploads one.
    """

    def __init__(self, logger: str, log_model: bool | Literal["all"], send: Callable[[Checkpoint], None]) -> None:
        if log_model not in (True, False, "all"):
            raise MisconfigurationException(f"{logger}(log_model={log_model!r}) must be True, False or 'all'.")
        self._log_model, self._send = log_model, send
        self._sent: dict[str, float] = {}
        self._waiting: dict[int, object] = {}

    def saved(self, callback: object) -> None:
        """A callback has saved: upload now, or remember to do so at the end."""
        upload = self.set_aside(callback)
        if upload is not None:
            upload()

    def finish(self) -> None:
        """Upload what was kept to the end of a successful run."""
        upload = self.set_aside(None)
        if upload is not None:
            upload()

    def set_aside(self, callback: object | None) -> Callable[[], None] | None:
        """What uploads the files that the callback has now; None: nothing, or not yet.

        The files are linked, so that they can be deleted meanwhile. The argument None asks for what was kept until the
        end.
        """
        if callback is None:
            found = [one for kept in self._waiting.values() for one in self._new_files(kept)]
            self._waiting.clear()
        elif self._log_model == "all" or (self._log_model is True and getattr(callback, "save_top_k", None) == -1):
            found = self._new_files(callback)
        else:
            if self._log_model is True:
                self._waiting[id(callback)] = callback
            return None
        return partial(self._send_all, found) if found else None

    def _new_files(self, callback: object) -> list[_SetAside]:
        found: list[tuple[float, str]] = []
        scores = _scores(callback)
        for name in scores:
            path = Path(name)
            if path.is_file():
                found.append((path.stat().st_mtime, name))
        new: list[_SetAside] = []
        for changed, name in sorted(found):
            if self._sent.get(name, -1.0) >= changed:
                continue
            is_best = name == getattr(callback, "best_model_path", None)
            link = _link(name)
            metadata = _metadata(callback, name, scores[name])
            new.append(_SetAside(Checkpoint(link or name, is_best, metadata), link is not None))
            self._sent[name] = changed
        return new

    def _send_all(self, found: list[_SetAside]) -> None:
        while found:  # what was sent stays sent when the next one fails
            self._send(found[0].checkpoint)
            found.pop(0).forget()


class _SetAside(NamedTuple):
    checkpoint: Checkpoint
    is_link: bool

    def forget(self) -> None:
        if self.is_link:
            with suppress(OSError):
                os.remove(self.checkpoint.path)
                os.rmdir(os.path.dirname(self.checkpoint.path))


def _link(path: str) -> str | None:
    """A second name of a file, in a folder beside it; None where the file system has no such thing."""
    folder = None
    try:
        folder = tempfile.mkdtemp(prefix=".uploading-", dir=os.path.dirname(path))
        link = os.path.join(folder, os.path.basename(path))
        os.link(path, link)
    except OSError:
        if folder is not None:
            with suppress(OSError):
                os.rmdir(folder)
        return None
    return link


def _scores(callback: object) -> dict[str, object]:
    """The files a callback keeps, with their scores."""
    scores: dict[str, object] = {
        str(getattr(callback, "last_model_path", "")): getattr(callback, "current_score", None),
        str(getattr(callback, "best_model_path", "")): getattr(callback, "best_model_score", None),
    }
    kept = cast("Mapping[str, object]", getattr(callback, "best_k_models", {}))
    scores.update(kept)
    scores.pop("", None)
    return scores


def _metadata(callback: object, path: str, score: object) -> dict[str, object]:
    how = {name: simplify(getattr(callback, name)) for name in _DESCRIBED if hasattr(callback, name)}
    return {"score": simplify(score), "original_filename": Path(path).name, type(callback).__name__: how}
