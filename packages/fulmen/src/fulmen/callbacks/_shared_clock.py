"""A time limit that all ranks see pass at the same batch, without asking each other at every batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SharedClock"]

T = TypeVar("T")


class SharedClock:
    """Tells after which batch an interval is over.

    Rank 0's clock decides. Whenever ranks meet it also says after how many batches they meet again: a quarter of those
    that are expected to be left, so the meetings get closer towards the end and there are few of them.
    """

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now; every rank calls it at the same batch."""
        self._begin = time.monotonic()
        self._batches = 0
        self._meet_at = 1

    def is_over(self, broadcast: Callable[[tuple[bool, int]], tuple[bool, int]]) -> bool:
        """Called after every batch of every rank; ``broadcast`` gives all ranks what rank 0 has. True begins anew."""
        self._batches += 1
        if self._batches < self._meet_at:
            return False
        elapsed_s = time.monotonic() - self._begin
        left_s = self.interval_s - elapsed_s
        batches_left = left_s * self._batches / max(elapsed_s, 1e-6)
        over, wait = broadcast((left_s <= 0, min(max(int(batches_left / 4), 1), 1000)))
        if over:
            self.restart()
        else:
            self._meet_at = self._batches + wait
        return over
