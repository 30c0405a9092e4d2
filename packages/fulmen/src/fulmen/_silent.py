"""Loggers that write nothing: for quick runs, and for the ranks that must not write what rank 0 writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fulmen_protocols import Logger, LoggerStatus

__all__ = ["DummyExperiment", "DummyLogger", "MutedLogger"]


class DummyExperiment:
    """Stands in for a logger's ``experiment``: every method can be called, indexed and entered, and does nothing."""

    def __getattr__(self, name: str) -> DummyExperiment:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> DummyExperiment:
        return self

    def __getitem__(self, key: object) -> DummyExperiment:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        """Forget it."""

    def __iter__(self) -> Iterator[DummyExperiment]:
        return iter(())

    def __enter__(self) -> DummyExperiment:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class DummyLogger:
    """Takes everything and keeps nothing; ``fast_dev_run`` uses it."""

    name: str | None = ""
    version: int | str | None = ""
    save_dir: str | None = None
    log_dir: str | None = None
    experiment = DummyExperiment()
    root_dir: str | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Forget the row."""

    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        """Forget them."""

    def save(self) -> None:
        """Nothing to write."""

    def finalize(self, status: LoggerStatus) -> None:
        """Nothing to close."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _forget


class MutedLogger(DummyLogger):
    """A logger on a rank other than 0: answers what the real one would, writes nothing."""

    def __init__(self, logger: Logger) -> None:
        self.__dict__["_logger"] = logger

    def __getattribute__(self, name: str) -> Any:
        if name in _ANSWERS:
            return getattr(object.__getattribute__(self, "_logger"), name)
        return object.__getattribute__(self, name)


_ANSWERS = frozenset({"name", "version", "save_dir", "log_dir", "root_dir"})


def _forget(*args: object, **kwargs: object) -> None:
    """What a logger's method does when it is muted."""
