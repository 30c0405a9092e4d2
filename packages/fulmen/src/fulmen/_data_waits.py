"""Measures how long training waits for data, at the price of two looks at the clock for each batch."""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fulmen.data_wait import DataWait

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LATE_S", "DataWaits"]

LATE_S = 0.001
"""A batch that comes later than this is looked at; on a GPU that costs two events."""

_TIMED = frozenset({"cuda", "xpu", "mps"})
"""Kinds of devices whose events know the time."""

T = TypeVar("T")


class DataWaits:
    """The waits of one fit. Who draws batches asks the clock before and after, and reports here.

    Args:
        device: whose time is wasted. The CPU waits while the host does. Another one has work queued meanwhile: a mark
            is left in its queue after each step and another when a late batch has come, and what lies between them is
            the time that it stood still. Marks are read when they have been passed: nobody ever waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._idle = _IdleTime(device) if device.type in _TIMED else None
        self.is_known = device.type == "cpu" or self._idle is not None
        """Whether it can be told: the queues of some devices cannot be asked."""
        self.mark = None if self._idle is None else self._idle.begin
        """To be called before each batch is asked for; None: nothing is to be called."""
        self.short_s = 0.0
        """Waits of the host of at most ``LATE_S`` each; added to by those who measure them."""
        self.first_index = 0
        """Index of the batch that is the first of the running epoch."""
        self.validation_s = 0.0
        """Of the training's time; added to by the validation."""
        self.num_workers: int | None = None
        self._late_s = self._late_first_s = 0.0  # the host's
        self._idle_s = self._idle_first_s = 0.0  # the device's
        self._epochs = 0
        self._epoch_began = 0.0
        self._began: float | None = None
        self._ended: float | None = None
        self._batches_before = 0

    def begin(self, total_batches: int) -> None:
        """Training begins, in a run that has so many batches behind it."""
        self._began, self._batches_before = perf_counter(), total_batches

    def end(self) -> None:
        """Training has ended. May be called twice."""
        if self._ended is None:
            self._ended = perf_counter()

    def late(self, waited_s: float, index: int) -> None:
        """The host has waited more than ``LATE_S`` for the batch ``index``."""
        is_first = index == self.first_index
        if is_first:
            self._late_first_s += waited_s
        else:
            self._late_s += waited_s
        if self._idle is not None:
            self._idle.end(is_first)
            self._read()

    def begin_epoch(self, index: int) -> None:
        """The iterator of an epoch, and with it its workers, are started; its first batch is ``index``."""
        self._epochs += 1
        self.first_index = index
        if self.mark is not None:
            self.mark()
        self._epoch_began = perf_counter()

    def epoch_has_begun(self) -> None:
        """They are."""
        started_s = perf_counter() - self._epoch_began
        if started_s > LATE_S:
            self.late(started_s, self.first_index)
        else:
            self.short_s += started_s

    def over(self, iterator: Iterator[T], index: int) -> Iterator[T]:
        """The batches of ``iterator`` from ``index`` on, each measured; for whom does not measure by himself."""
        mark = self.mark
        while True:
            if mark is not None:
                mark()
            began = perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            waited_s = perf_counter() - began
            if waited_s > LATE_S:
                self.late(waited_s, index)
            else:
                self.short_s += waited_s
            index += 1
            yield batch

    def figures(self, total_batches: int) -> DataWait | None:
        """What there is to say after so many batches; None before training, and where nobody can tell."""
        if self._began is None or not self.is_known:
            return None
        self._read()
        ended = perf_counter() if self._ended is None else self._ended
        first_s, rest_s = self._late_first_s, self._late_s + self.short_s
        fetching_s = rest_s
        if self._idle is not None:
            first_s, rest_s = self._idle_first_s, self._idle_s
        return DataWait(
            training_s=ended - self._began - self.validation_s,
            waited_s=first_s + rest_s,
            first_s=first_s,
            fetching_s=fetching_s,
            batches=total_batches - self._batches_before,
            epochs=self._epochs,
            num_workers=self.num_workers,
        )

    def _read(self) -> None:
        if self._idle is not None:
            for idle_s, is_first in self._idle.read():
                if is_first:
                    self._idle_first_s += idle_s
                else:
                    self._idle_s += idle_s


class _IdleTime:
    """How long a device's queue was empty between two moments of the host, as the device's own clock has it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._event()
        self._open: deque[tuple[torch.Event, torch.Event, bool]] = deque()

    def _event(self) -> torch.Event:
        return torch.Event(self._device, enable_timing=True)

    def begin(self) -> None:
        self._begin.record()

    def end(self, is_first: bool) -> None:
        # While work is queued the device goes straight from one mark to the other.
        end = self._event()
        end.record()
        self._open.append((self._begin, end, is_first))
        self._begin = self._event()

    def read(self) -> Iterator[tuple[float, bool]]:
        """Seconds, and what was noted, of those whose end the device has passed. Does not wait for the others."""
        while self._open and self._open[0][1].query():
            begin, end, noted = self._open.popleft()
            milliseconds: Any = begin.elapsed_time(end)
            yield milliseconds / 1000, noted
