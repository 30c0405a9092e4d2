"""Exceptions that a run ends with; ``fulmen_protocols.errors`` has configuration errors, also by Lightning's name."""

from __future__ import annotations

import signal

from fulmen_protocols import MisconfigurationException

__all__ = ["MisconfigurationException", "PreemptedException", "SIGTERMException"]


class _TunerExitException(Exception):  # pyright: ignore[reportUnusedClass]  # Lightning's name
    """A tuner has what it wanted: the call that it was made in ends here, without an error."""


class SIGTERMException(SystemExit):  # Lightning's name
    """The run was asked to end by SIGTERM and did so between two batches; the process exits with 128 + 15 = 143."""

    def __init__(self, reason: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class PreemptedException(SystemExit):
    """The scheduler announced the end of the job: the fit is saved, goes on in the job's next life, and ends here.

    The process exits with 75, which ``sysexits.h`` calls EX_TEMPFAIL: try again later.
    """

    EXIT_CODE = 75

    def __init__(self, reason: str, ckpt_path: str) -> None:
        super().__init__(self.EXIT_CODE)
        self.reason = reason
        self.ckpt_path = ckpt_path
        """Where the fit was saved."""

    def __str__(self) -> str:
        return f"{self.reason}; saved {self.ckpt_path}"
