"""The time of each part of an optimizer step, as the host or as the device has it, taken without waiting for either."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen._data_waits import DataWaits

__all__ = [
    "BACKWARD",
    "DATA",
    "FORWARD",
    "HOOKS",
    "OPTIMIZER",
    "OUTSIDE",
    "OWN",
    "TRANSFER",
    "WAITING",
    "StepTimes",
    "step_times",
    "usual",
]

OWN = ("data", "transfer", "hooks", "forward", "backward", "optimizer")
"""Parts of a step in which a rank does its own work, as names; a step's times have them in this order."""

DATA, TRANSFER, HOOKS, FORWARD, BACKWARD, OPTIMIZER, WAITING, OUTSIDE = range(len(OWN) + 2)
"""Indices into a step's times. ``WAITING`` may hold waits for other ranks; ``OUTSIDE`` belongs to no step."""

_TIMED = frozenset({"cuda", "xpu"})
"""Kinds of devices whose events know the time and can be recorded from every thread."""

_BLOCKS = 3


class StepTimes(Protocol):
    """Divides time among the parts of steps."""

    def turn(self, part: int) -> None:
        """Give the time since the last turn to ``part``, but for what the loader took of it, which is ``DATA``."""
        ...

    def end_step(self) -> None:
        """What comes now belongs to the next step."""
        ...

    def take(self) -> list[list[float]]:
        """Seconds of the parts of each step that is known by now and was not taken before. Does not wait."""
        ...


def step_times(device: torch.device, waits: DataWaits) -> StepTimes:
    """The clock of ``device``: its own where it works behind the host and knows the time, else the host's."""
    return _DeviceTimes(device, waits) if device.type in _TIMED else _HostTimes(waits)


def usual(steps: Sequence[Sequence[float]]) -> list[float] | None:
    """The parts of a usual step among ``steps``; None if there are too few.

    Steps are cut into three blocks, and of their means that with the median time of own work is taken. So a delay
    counts that comes every few steps, as with a loader's workers, and one that comes once does not.
    """
    if len(steps) < _BLOCKS:
        return None
    bounds = [len(steps) * index // _BLOCKS for index in range(_BLOCKS + 1)]
    means = [[fmean(column) for column in zip(*steps[begin:end], strict=True)] for begin, end in pairwise(bounds)]
    means.sort(key=lambda mean: sum(mean[: len(OWN)]))
    return means[_BLOCKS // 2]


class _Fetching:
    """What the loader has taken since one last looked."""

    __slots__ = ("_first", "_first_before", "_rest", "_rest_before")

    def __init__(self, waits: DataWaits) -> None:
        self._first, self._rest = waits.first, waits.rest
        self._first_before: float = waits.first.s
        self._rest_before: float = waits.rest.s

    def look(self) -> tuple[float, float] | None:
        """Seconds for batches but the first of an epoch, and for all; None: there was no batch."""
        first_s, rest_s = self._first.s, self._rest.s
        if first_s == self._first_before and rest_s == self._rest_before:
            return None
        counted_s = rest_s - self._rest_before
        all_s = counted_s + first_s - self._first_before
        self._first_before, self._rest_before = first_s, rest_s
        return counted_s, all_s


def _divide(times: list[float], elapsed_s: float, part: int, fetching: tuple[float, float] | None) -> None:
    if fetching is not None:
        # A device that had work left stood still for less than the host was waiting.
        times[DATA] += min(fetching[0], elapsed_s)
        elapsed_s = max(elapsed_s - fetching[1], 0.0)
    times[part] += elapsed_s


class _HostTimes:
    def __init__(self, waits: DataWaits) -> None:
        self._fetching = _Fetching(waits)
        self._done: list[list[float]] = []
        self._times = [0.0] * (OUTSIDE + 1)
        self._last = perf_counter()

    def turn(self, part: int) -> None:
        now = perf_counter()
        _divide(self._times, now - self._last, part, self._fetching.look())
        self._last = now

    def end_step(self) -> None:
        self._done.append(self._times)
        self._times = [0.0] * (OUTSIDE + 1)

    def take(self) -> list[list[float]]:
        done, self._done = self._done, []
        return done


class _DeviceTimes:
    """Marks in the device's queue, read when it has passed the last one of a step.

    Where the device waits for the host, to be given work, that time belongs to the part in which the host was late.
    """

    def __init__(self, device: torch.device, waits: DataWaits) -> None:
        self._device, self._fetching = device, _Fetching(waits)
        self._steps: deque[list[tuple[torch.Event, int, tuple[float, float] | None]]] = deque()
        self._marks: list[tuple[torch.Event, int, tuple[float, float] | None]] = [(self._mark(), OUTSIDE, None)]

    def _mark(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def turn(self, part: int) -> None:
        self._marks.append((self._mark(), part, self._fetching.look()))

    def end_step(self) -> None:
        self._steps.append(self._marks)
        self._marks = self._marks[-1:]

    def take(self) -> list[list[float]]:
        done: list[list[float]] = []
        while self._steps and self._steps[0][-1][0].query():
            marks = self._steps.popleft()
            times = [0.0] * (OUTSIDE + 1)
            for (begin, _, _), (end, part, fetching) in pairwise(marks):
                _divide(times, begin.elapsed_time(end) / 1000, part, fetching)
            done.append(times)
        return done
