"""Profiler: how long named actions of a run take."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["Profiler"]


@runtime_checkable
class Profiler(Protocol):
    """Measures actions by name. Actions may nest; one name is not started twice at a time."""

    def start(self, action_name: str) -> None:
        """Begin to measure."""
        ...

    def stop(self, action_name: str) -> None:
        """End to measure. Raises ``ValueError`` for an action that was not started."""
        ...

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Learn the stage (``fit``, ``validate``, ``test``, ``predict``), this rank, and where reports go."""
        ...

    def teardown(self, stage: str | None) -> None:
        """Close files. Calling it twice is allowed."""
        ...

    def summary(self) -> str:
        """The report as text."""
        ...

    def describe(self) -> None:
        """Print or write the report."""
        ...
