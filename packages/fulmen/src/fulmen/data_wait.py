"""DataWait: how long training had nothing to do because it waited for its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DataWait"]


@dataclass(frozen=True, slots=True)
class DataWait:
    """What one rank's training waited for, as ``trainer.data_wait`` tells it while a fit runs and afterwards.

    On the CPU a wait is the time in the loader's ``next``. On a device that works behind the host it is only the part
    during which the device had nothing left to do, by its own clock; waits of the host of less than a millisecond are
    not looked at there.
    """

    training_s: float
    """Seconds since training began, validations left out."""
    waited_s: float
    """Seconds of them in which training waited for data."""
    first_s: float
    """Seconds of those before the first batches of epochs, when workers start."""
    fetching_s: float
    """Seconds that the host spent in the loader's ``next``, first batches left out, whether or not anybody waited."""
    batches: int
    epochs: int
    """Epochs that were begun."""
    num_workers: int | None
    """Of the training loader; None where it is no single ``DataLoader``."""

    @property
    def share(self) -> float:
        """The part of training that was waiting, 0 to 1."""
        return self.waited_s / self.training_s if self.training_s > 0 else 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a training step, all that happens between two batches included, but not the wait."""
        return (self.training_s - self.waited_s) / self.batches if self.batches else math.nan

    @property
    def batch_s(self) -> float:
        """Seconds in which one worker makes one batch; without workers, in which this process makes it. NaN: unknown.

        While training waits, all w workers are busy and give w batches in the time in which one makes one. The first w
        of each epoch are made during the wait for the first, and none is made during the step on the last, so
        ``w * (training_s - first_s - epochs * step_s) / (batches - w * epochs)``. It is an upper bound where training
        waits now and then only, for then workers rest, too.
        """
        workers = self.num_workers
        if workers is None:
            return math.nan
        if workers == 0:
            rest = self.batches - self.epochs
            return self.fetching_s / rest if rest > 0 else math.nan
        rest = self.batches - workers * self.epochs
        made_s = self.training_s - self.first_s - self.epochs * self.step_s
        return workers * made_s / rest if rest > 0 else math.nan

    @property
    def workers_needed(self) -> int | None:
        """Workers with which training would not wait: the time to make a batch over the time of a step, rounded up.

        None where one of them is not known.
        """
        needed = self.batch_s / self.step_s if self.step_s > 0 else math.nan
        return None if math.isnan(needed) else max(1, math.ceil(needed))
