"""Which ranks are slow, from the times of all ranks in one window of steps after the other."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

from fulmen.callbacks._step_times import OWN, WAITING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RankTimes", "SlowRanks", "Straggler", "slowdowns"]

_LEAST_S = 0.0005
"""A rank that is late by less than this in a step is not called slow, however short the step is."""

_LEAST_OF_STEP = 0.25
"""Nor is one that makes steps longer by less than this part of the threshold, as where reducing takes most of them."""


class RankTimes(NamedTuple):
    """A window of one rank."""

    host: str
    step: int
    """Optimizer steps of the run when the window began."""
    parts: Sequence[float]
    """Seconds of a usual step's parts."""
    is_whole: bool
    """Whether no work of its own is hidden in ``WAITING``."""


class Straggler(NamedTuple):
    """A rank that the others wait for."""

    rank: int
    host: str
    """Name of its machine."""
    part: str
    """Where most of the time goes: ``"data"`` (the loader), ``"transfer"`` (to the device), ``"hooks"`` (callbacks and
    the module's hooks on batches), ``"forward"``, ``"backward"`` or ``"optimizer"``."""
    since_step: int
    """Optimizer steps of the run when it began."""
    slowdown: float
    """By what share its own work in a step takes longer than the median of the other ranks: 0.15 are 15 %."""
    step_slowdown: float
    """By what share of its time a step takes longer because of this rank."""
    late_s: float
    """Seconds of its own work in a step beyond that median."""
    part_late_s: float
    """The same for ``part`` alone."""


def slowdowns(window: Sequence[RankTimes]) -> list[Straggler]:
    """Each rank as if it were slow; of one that is not ``slowdown`` is small or negative. Needs two ranks."""
    result: list[Straggler] = []
    own = [sum(times.parts[: len(OWN)]) for times in window]
    # What nobody can tell from waiting may be work; no rank has more of it than the one that waits least.
    is_whole = all(times.is_whole for times in window)
    hidden_s = 0.0 if is_whole else min(times.parts[WAITING] for times in window)
    for rank, times in enumerate(window):
        usual_s = _median_of_others(own, rank)
        late_s = own[rank] - usual_s
        late_of = [
            times.parts[part] - _median_of_others([each.parts[part] for each in window], rank)
            for part in range(len(OWN))
        ]
        worst = max(range(len(OWN)), key=late_of.__getitem__)
        # The step as it would be without this rank; it is no shorter than what the others have to do in it.
        step_s = max(own[rank] + times.parts[WAITING] - max(late_s, 0.0), usual_s)
        result.append(
            Straggler(
                rank=rank,
                host=times.host,
                part=OWN[worst],
                since_step=times.step,
                slowdown=_share(late_s, usual_s + hidden_s),
                step_slowdown=_share(late_s, step_s),
                late_s=late_s,
                part_late_s=late_of[worst],
            )
        )
    return result


def _share(seconds: float, of_s: float) -> float:
    return seconds / of_s if of_s > 0 else 0.0


def _median_of_others(values: Sequence[float], rank: int) -> float:
    # Without its own value, which with two ranks would be half of it.
    return median_low([*values[:rank], *values[rank + 1 :]])


@dataclass
class _Course:
    slow: int = 0
    """Windows in a row in which the rank was slow."""
    calm: int = 0
    """Windows in a row, since it was named, in which it was not."""
    since_step: int = 0
    is_named: bool = False


class SlowRanks:
    """Names a rank when it has been slow for some windows in a row, and again only after it has recovered."""

    def __init__(self, threshold: float, patience: int) -> None:
        """``threshold`` is the slowdown beyond which a rank is slow; with half of it it has recovered."""
        self._threshold, self._patience = threshold, patience
        self._courses: dict[int, _Course] = {}

    def judge(self, window: Sequence[Straggler]) -> tuple[list[Straggler], list[Straggler]]:
        """Who is to be named now, and who has recovered. Windows must be given in order."""
        named: list[Straggler] = []
        recovered: list[Straggler] = []
        for each in window:
            course = self._courses.setdefault(each.rank, _Course())
            if self._is_beyond(each, self._threshold):
                if course.slow == 0:
                    course.since_step = each.since_step
                course.slow, course.calm = course.slow + 1, 0
                if course.slow >= self._patience and not course.is_named:
                    course.is_named = True
                    named.append(each._replace(since_step=course.since_step))
                continue
            is_calm = not self._is_beyond(each, self._threshold / 2)
            course.slow, course.calm = 0, course.calm + 1 if is_calm else 0
            if course.is_named and course.calm >= self._patience:
                course.is_named = False
                recovered.append(each)
        return named, recovered

    @staticmethod
    def _is_beyond(each: Straggler, threshold: float) -> bool:
        return each.slowdown > threshold and each.step_slowdown > threshold * _LEAST_OF_STEP and each.late_s > _LEAST_S
