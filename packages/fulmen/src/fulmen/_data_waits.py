"""Measures how long training waits for data, at the price of two looks at the clock for each batch."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fulmen.data_wait import DataWait

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

__all__ = ["DataWaits", "Spent"]

_LATE_S = 0.001
"""A GPU is asked about batches that come later than this."""

_TIMED = frozenset({"cuda", "xpu"})
"""Kinds of devices whose events know the time."""

T = TypeVar("T")


class Spent:
    """Seconds of the host, added to by who measures them."""

    __slots__ = ("s",)

    def __init__(self) -> None:
        self.s = 0.0


class DataWaits:
    """The waits of one fit.

    Args:
        device: whose time is wasted. The CPU waits while the host does. Another one has work queued meanwhile: a mark
            is left in its queue after each step and another when a late batch has come, and what lies between them is
            the time that it stood still. Marks are read when they have been passed: nobody ever waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._idle = _IdleTime(device) if device.type in _TIMED else None
        self._is_known = device.type == "cpu" or self._idle is not None  # some queues cannot be asked
        self.first = Spent()
        """Until the first batches of epochs came, the starts of their iterators included."""
        self.rest = Spent()
        """Until the other batches came."""
        self.validation_s = 0.0
        """Of the training's time; added to by the validation."""
        self.num_workers: int | None = None
        self._idle_first_s = self._idle_rest_s = 0.0
        self._epochs = 0
        self._began: float | None = None
        self._ended: float | None = None
        self._batches_before = 0

    @property
    def looks_at_the_host_alone(self) -> bool:
        """Whether it is enough to add to ``first`` and ``rest``; else batches must be drawn through ``over``."""
        return self._idle is None

    def begin(self, total_batches: int) -> None:
        """Training begins, in a run that has so many batches behind it."""
        self._began, self._batches_before = perf_counter(), total_batches

    def end(self) -> None:
        """Training has ended. May be called twice."""
        if self._ended is None:
            self._ended = perf_counter()

    @contextmanager
    def starting(self) -> Generator[None, None, None]:
        """Within the block the iterator of an epoch, and with it its workers, are started."""
        self._epochs += 1
        began = self._begin_wait()
        yield
        self._end_wait(began, self.first)

    def over(self, iterator: Iterator[T]) -> Iterator[T]:
        """The batches of an epoch, each measured; for who does not measure by himself."""
        spent = self.first
        while True:
            began = self._begin_wait()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._end_wait(began, spent)
            spent = self.rest
            yield batch

    def _begin_wait(self) -> float:
        if self._idle is not None:
            self._idle.begin()
        return perf_counter()

    def _end_wait(self, began: float, spent: Spent) -> None:
        waited_s = perf_counter() - began
        spent.s += waited_s
        if self._idle is not None and waited_s > _LATE_S:
            self._idle.end(spent is self.first)
            self._read()

    def figures(self, total_batches: int) -> DataWait | None:
        """What there is to say after so many batches; None before training, and where nobody can tell."""
        if self._began is None or not self._is_known:
            return None
        first_s, rest_s = self.first.s, self.rest.s
        if self._idle is not None:
            self._read()
            first_s, rest_s = self._idle_first_s, self._idle_rest_s
        ended = perf_counter() if self._ended is None else self._ended
        return DataWait(
            training_s=ended - self._began - self.validation_s,
            waited_s=first_s + rest_s,
            first_s=first_s,
            fetching_s=self.rest.s,
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
                    self._idle_rest_s += idle_s


class _IdleTime:
    """How long the current stream was empty between two moments of the host, as the device's own clock has it."""

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
