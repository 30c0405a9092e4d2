"""ProgressReporter: what a person watching the terminal sees."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["ProgressReporter"]


@runtime_checkable
class ProgressReporter(Protocol):
    """A progress bar or its plain-text replacement. It draws by time and never reads a device tensor."""

    def enable(self) -> None:
        """Draw from now on."""
        ...

    def disable(self) -> None:
        """Draw nothing (ranks other than 0)."""
        ...

    def print(self, *args: object, **kwargs: object) -> None:
        """Print without breaking the bar."""
        ...
