"""Plan: how far and how often. Pure functions of Progress; no torch, no I/O."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen.progress import Progress

__all__ = ["Plan"]

_INF = float("inf")


@dataclass(frozen=True, slots=True)
class Plan:
    """When a run ends, validates, logs and steps.

    Counts of batches are ``inf`` where a loader does not know its length.
    """

    max_epochs: int = -1
    """Epochs after which training ends; -1: no limit."""
    min_epochs: int = 0
    """Epochs before which a request to stop is not honoured."""
    max_steps: int = -1
    """Optimizer steps after which training ends; -1: no limit."""
    min_steps: int = 0
    """Optimizer steps before which a request to stop is not honoured."""
    batches: float = _INF
    """Training batches of one epoch on this rank."""
    accumulate: int = 1
    """Batches per optimizer step. The last, shorter window of an epoch steps too."""
    validates: bool = False
    """Whether there is anything to validate."""
    validate_every_batches: float = _INF
    """Batches between validations; ``inf``: at the end of the epoch."""
    validate_every_epochs: int | None = 1
    """Epochs with validation; None: ``validate_every_batches`` counts across epochs."""
    validate_every_s: float | None = None
    """Seconds between the end of a validation and the start of the next; None: not by time."""
    log_every: int = 50
    """Optimizer-stepping batches between rows of the loggers; 0: never."""
    log_always: bool = False
    """A row after every batch (``fast_dev_run``)."""

    def limit_reached(self, progress: Progress) -> bool:
        """Whether ``max_steps`` or ``max_epochs`` is used up."""
        if self.max_steps != -1 and progress.updates >= self.max_steps:
            return True
        return self.max_epochs != -1 and progress.epoch >= self.max_epochs

    def may_stop(self, progress: Progress) -> bool:
        """Whether a request to stop is honoured now: it cannot wait, or ``min_epochs`` and ``min_steps`` are done."""
        return progress.stop_now or (progress.epoch >= self.min_epochs and progress.updates >= self.min_steps)

    def finished(self, progress: Progress) -> bool:
        """Whether no further batch will be trained."""
        if self.batches == 0 or self.limit_reached(progress):
            return True
        return progress.stop_reason is not None and self.may_stop(progress)

    def is_last(self, batch: int) -> bool:
        """Whether the batch with this index ends the epoch, as far as a count can tell."""
        return batch + 1 >= self.batches

    def steps(self, batch: int, is_last: bool) -> bool:
        """Whether an optimizer step follows the batch with this index."""
        return is_last or (batch + 1) % self.accumulate == 0

    def logs(self, progress: Progress) -> bool:
        """Whether the batch just done gets a row. ``stepped_batches`` already counts it."""
        if self.log_every == 0:
            return False
        return progress.stepped_batches % self.log_every == 0 or self.log_always or progress.stop_reason is not None

    def validates_epoch(self, progress: Progress) -> bool:
        """Whether the running epoch is one with validation."""
        every = self.validate_every_epochs
        return self.validates and (every is None or (progress.epoch + 1) % every == 0)

    def validation_due(self, progress: Progress, is_last: bool, *, last_validation_s: float | None = None) -> bool:
        """Whether to validate after the batch just done. ``progress.batch`` already counts it.

        Args:
            progress: the run's counters.
            is_last: whether that batch ended the epoch.
            last_validation_s: ``time.monotonic()`` at the end of the last validation or the start of the run.
        """
        if not self.validates_epoch(progress):
            return False
        if self.validate_every_s is not None:
            assert last_validation_s is not None
            return time.monotonic() - last_validation_s >= self.validate_every_s
        if is_last and self.validate_every_batches == _INF:
            return True
        if progress.stop_reason is not None and not progress.stop_now and self.may_stop(progress):
            return True
        if self.validate_every_batches == _INF:
            return False
        done = progress.total_batches if self.validate_every_epochs is None else progress.batch
        return done % self.validate_every_batches == 0

    def estimated_steps(self) -> float:
        """Optimizer steps of the whole run; ``inf`` when unbounded."""
        if self.batches == _INF or self.max_epochs == -1:
            return self.max_steps if self.max_steps != -1 else _INF
        steps = -(-int(self.batches) // self.accumulate) * self.max_epochs
        return steps if self.max_steps == -1 else min(steps, self.max_steps)
