"""Profiler: how long named actions of a run take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import nn

__all__ = ["Profiler", "SupportsModuleRecording", "SupportsRunParts"]


@runtime_checkable
class Profiler(Protocol):
    """Measures actions by name. Actions may nest; one name is not started twice at a time."""

    def start(self, action_name: str) -> None:
        """Begin to measure."""
        ...

    def stop(self, action_name: str) -> None:
        """End to measure. Raises ``ValueError`` for an action that was not started."""
        ...

    def profile(self, action_name: str) -> AbstractContextManager[object]:
        """Measure a block; what users write, ``with self.trainer.profiler.profile("...")``."""
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


@runtime_checkable
class SupportsModuleRecording(Protocol):
    """A profiler that wants to know the model whose actions it measures."""

    def record_module(self, module: nn.Module, expected_calls: Callable[[str], float]) -> None:
        """Called after ``setup``.

        Args:
            module: the user's, as it is before anything is placed.
            expected_calls: how often a step function (``training_step``, ...) will be called without another one in
                between, once its loaders are known; ``inf`` where they have no length.
        """
        ...


@runtime_checkable
class SupportsRunParts(Protocol):
    """A profiler that divides the time of a run, so that it is told of parts which are no actions.

    Parts and actions nest.
    """

    def enter(self, part: str) -> None:
        """``training``, ``validation`` within a fit, ``sanity check`` or ``logging`` begins."""
        ...

    def leave(self, part: str) -> None:
        """It has ended."""
        ...

    def row(self) -> Mapping[str, float]:
        """What loggers get beside each row of training; called once for each."""
        ...
