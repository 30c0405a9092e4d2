"""How a run hands its log to the loggers."""

from __future__ import annotations

from dataclasses import dataclass

from fulmen_protocols import MisconfigurationException

__all__ = ["LogDelivery"]


@dataclass(frozen=True)
class LogDelivery:
    """How a Trainer hands its log to its loggers: ``trainer.log_delivery``, settable between two calls.

    Args:
        queue_rows: rows that wait for one logger in memory at most; more are read again from the run's log.
        finalize_timeout_s: seconds that the end of a run waits at most for all its loggers together.
        upload_timeout_s: the same while checkpoints are being uploaded.
        retry_s: pause after the first failure of a logger; it doubles with each further one.
        longest_retry_s: what it grows to.
        report: whether a page about the run is written beside its log.

    Raises:
        MisconfigurationException: a number is not positive.
    """

    queue_rows: int = 10_000
    finalize_timeout_s: float = 30.0
    upload_timeout_s: float = 600.0
    retry_s: float = 0.5
    longest_retry_s: float = 30.0
    report: bool = True

    def __post_init__(self) -> None:
        for name in ("queue_rows", "finalize_timeout_s", "upload_timeout_s", "retry_s", "longest_retry_s"):
            if not getattr(self, name) > 0:
                raise MisconfigurationException(f"LogDelivery({name}={getattr(self, name)!r}): give more than 0.")
