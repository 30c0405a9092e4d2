"""Exceptions that a run ends with; ``fulmen_protocols.errors`` has configuration errors, also by Lightning's name."""

from __future__ import annotations

import signal

from fulmen_protocols import MisconfigurationException

__all__ = ["MisconfigurationException", "SIGTERMException"]


class _TunerExitException(Exception):  # pyright: ignore[reportUnusedClass]  # Lightning's name
    """A tuner has what it wanted: the call that it was made in ends here, without an error."""


class SIGTERMException(SystemExit):  # Lightning's name
    """The run was asked to end by SIGTERM and did so between two batches; the process exits with 128 + 15 = 143."""

    def __init__(self, reason: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason
