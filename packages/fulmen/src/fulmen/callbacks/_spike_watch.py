"""Which values of a run are spikes: judged on the host, from values that come there by themselves."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING, Any, NamedTuple

from fulmen._metric_read import Arrival

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Place", "Spike", "Watch"]


class Place(NamedTuple):
    """Where in a run a value belongs."""

    at: int
    """Steps that the watch had seen, this one included."""
    step: int
    """Optimizer steps taken, this one included."""


class Spike(NamedTuple):
    """A value that is too large, or not finite."""

    place: Place
    value: float
    threshold: float | None
    """What it was compared with; None where it is not finite."""
    what: str
    """Whose value it is: ``"the loss"``, or another."""


class Watch:
    """Judges each step's value by those before it, some steps later.

    Values are gathered until ``send``; then they are on their way, and ``judge_sent`` looks at those that were sent the
    time before. So when a value is judged depends on the count of steps alone, never on how fast a device is.

    Args:
        what: whose values they are.
        factor: a spike is further above the median than this multiple of it, less one; None: does not matter.
        sigmas: a spike is more than so many standard deviations above the mean; None: does not matter.
        window: latest values that are compared with. With less than half of them only what is not finite is a spike.
    """

    def __init__(self, what: str, factor: float | None, sigmas: float | None, window: int) -> None:
        self._what, self._factor, self._sigmas, self._window = what, factor, sigmas, window
        self._known: deque[tuple[int, float]] = deque(maxlen=window)
        self._fresh: list[tuple[Place, Tensor | float]] = []
        self._sent: tuple[list[Place], Arrival] = ([], Arrival([]))
        self.quiet_until = 0
        """Up to this many steps only what is not finite is a spike."""

    def add(self, place: Place, value: Tensor | float) -> None:
        """The value of a step; nothing else may write into it."""
        self._fresh.append((place, value))

    def send(self) -> None:
        """Let the values since the last time come to the host."""
        self._sent = [place for place, _ in self._fresh], Arrival([value for _, value in self._fresh])
        self._fresh = []

    def judge_sent(self) -> Spike | None:
        """The first spike among the values that were last sent."""
        places, arrival = self._sent
        values = arrival.read()
        for at, (place, value) in enumerate(zip(places, values, strict=True)):
            found = self._judge(place, value)
            if found is not None:
                self._sent = places[at:], Arrival(values[at:])  # it is a spike until it has been undone
                return found
        self._sent = [], Arrival([])
        return None

    def judge_all(self) -> Spike | None:
        """The first spike among all values so far; waits for the device."""
        found = self.judge_sent()
        if found is None:
            self.send()
            found = self.judge_sent()
        return found

    def forget_from(self, at: int) -> None:
        """Drop the values from the ``at``-th step on, judged or not: they are of weights that are gone."""
        self._fresh, self._sent = [], ([], Arrival([]))
        while self._known and self._known[-1][0] >= at:
            self._known.pop()

    def _judge(self, place: Place, value: float) -> Spike | None:
        """A value that is no spike is known from now on."""
        if not math.isfinite(value):
            return Spike(place, value, None, self._what)
        threshold = self._threshold() if place.at > self.quiet_until else math.inf
        if value > threshold:
            return Spike(place, value, threshold, self._what)
        self._known.append((place.at, value))
        return None

    def _threshold(self) -> float:
        """What both bounds allow; infinite while too little is known."""
        values = [value for _, value in self._known]
        if 2 * len(values) < self._window or (self._factor is None and self._sigmas is None):
            return math.inf
        bounds: list[float] = []
        if self._factor is not None:
            middle = median(values)
            bounds.append(middle + (self._factor - 1) * abs(middle))
        if self._sigmas is not None:
            bounds.append(fmean(values) + self._sigmas * pstdev(values))
        return max(bounds)

    def state_dict(self) -> dict[str, Any]:
        """What has been judged, and what is still to be, as plain data; waits for the device if there is any."""
        sent, fresh = self._sent, self._fresh
        return {
            "known": [list(each) for each in self._known],
            "sent": [[*place, value] for place, value in zip(sent[0], sent[1].read(), strict=True)],
            "fresh": [
                [*place, value]
                for (place, _), value in zip(fresh, Arrival([value for _, value in fresh]).read(), strict=True)
            ],
            "quiet_until": self.quiet_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._known = deque(((int(at), float(value)) for at, value in state["known"]), maxlen=self._window)
        self._fresh = [(Place(at, step), value) for at, step, value in state["sent"]]
        self.send()
        self._fresh = [(Place(at, step), value) for at, step, value in state["fresh"]]
        self.quiet_until = int(state["quiet_until"])
