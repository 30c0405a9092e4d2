"""Which checkpoints a logger has yet to upload, and what it says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

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
        if self._log_model == "all" or (self._log_model is True and getattr(callback, "save_top_k", None) == -1):
            self._upload(callback)
        elif self._log_model is True:
            self._waiting[id(callback)] = callback

    def finish(self) -> None:
        """Upload what was kept to the end of a successful run."""
        for callback in self._waiting.values():
            self._upload(callback)
        self._waiting.clear()

    def _upload(self, callback: object) -> None:
        found: list[tuple[float, str]] = []
        scores = _scores(callback)
        for name in scores:
            path = Path(name)
            if path.is_file():
                found.append((path.stat().st_mtime, name))
        for changed, name in sorted(found):
            if self._sent.get(name, -1.0) >= changed:
                continue
            is_best = name == getattr(callback, "best_model_path", None)
            self._send(Checkpoint(name, is_best, _metadata(callback, name, scores[name])))
            self._sent[name] = changed


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
