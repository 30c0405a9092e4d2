"""Times at which the device finished its work, taken without waiting for it."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DeviceClock", "Mark"]

Mark = float | torch.Event
"""A moment: of the host's clock, or when the device reaches this place of its queue."""

_TIMED = frozenset({"cuda", "xpu", "mps"})
"""Kinds of devices whose events know the time."""


class DeviceClock:
    """Marks moments in the device's queue and reads them later, all with one wait.

    A device that works ahead of nothing (the CPU), or whose events know no time, is timed by the host.

    Args:
        device: which one's queue.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type in _TIMED else None
        self._last: Mark = self.mark()
        self._last_s = 0.0

    def mark(self) -> Mark:
        """This moment; does not wait."""
        if self._device is None:
            return perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def read(self, marks: Sequence[Mark]) -> list[float]:
        """Seconds from the clock's start to each of ``marks``, in the order they were made. Waits for the last one."""
        seconds: list[float] = []
        for mark in marks:
            if not isinstance(mark, torch.Event):
                self._last_s += mark - cast("float", self._last)
            else:
                mark.synchronize()  # once per row of the loggers: the later ones of a row are soon there
                # From one to the next: the device tells milliseconds as float32, too coarse after hours.
                self._last_s += cast("torch.Event", self._last).elapsed_time(mark) / 1000
            self._last = mark
            seconds.append(self._last_s)
        return seconds
