"""What a run's log says, as curves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from fulmen.runlog._record import Record, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen.runlog._reader import RunLog

__all__ = ["Curve", "Figure", "best_checkpoint", "learning_rates", "memory", "metrics", "throughput"]

_STAGE = re.compile(r"^(train|training|val|valid|validation|test)[_/.\-]")
_KIND = re.compile(r"_(step|epoch)$")
_HIDDEN = frozenset({"epoch"})
_WINDOWS = 50


@dataclass
class Curve:
    """Points of one name, in the order of x."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])


@dataclass
class Figure:
    """Curves that are compared with each other."""

    title: str
    curves: list[Curve]
    x_label: str = "step"
    mark: tuple[float, float] | None = None
    """A point to point at: the best checkpoint's."""
    is_bytes: bool = False
    is_exact: bool = False
    """Whether the points are no samples of something restless, whose mean one wants to see."""


def metrics(log: RunLog) -> list[Figure]:
    """Everything logged. What differs only in the stage or in step and epoch is in one figure."""
    groups: dict[tuple[str, str], dict[str, Curve]] = {}
    for located in log.rows:
        record = located.record
        per_batch = record.get("of") == "eval_step"
        x = float(cast("int", record["x"]))
        for name, logged in cast("Mapping[str, object]", record["values"]).items():
            value = number(logged)
            if value is None or name in _HIDDEN:
                continue
            stem = _STAGE.sub("", _KIND.sub("", name)) or name
            curves = groups.setdefault((stem, "evaluation batch" if per_batch else "step"), {})
            curves.setdefault(name, Curve(name)).points.append((x, value))
    best = best_checkpoint(log)
    figures: list[Figure] = []
    for (stem, x_label), curves in groups.items():
        for curve in curves.values():
            curve.points.sort(key=lambda point: point[0])
        figure = Figure(stem, list(curves.values()), x_label)
        if best is not None and (scored := curves.get(str(best.get("monitor")))) is not None:
            score = best.get("best_score")
            found = [point for point in scored.points if isinstance(score, float) and _close(point[1], score)]
            figure.mark = found[0] if found else None
        figures.append(figure)
    return sorted(figures, key=lambda figure: (figure.x_label != "step", "loss" not in figure.title.lower()))


def best_checkpoint(log: RunLog) -> Record | None:
    """The last record that names a best checkpoint."""
    return next((record for record in reversed(log.checkpoints) if record.get("best")), None)


def learning_rates(log: RunLog) -> Figure | None:
    """One curve for each optimizer and parameter group."""
    curves: dict[str, Curve] = {}
    for state in log.states:
        for name, rate in cast("Mapping[str, float]", state.get("lr", {})).items():
            curves.setdefault(name, Curve(name)).points.append((_at(state), rate))
    return Figure("learning rate", list(curves.values()), is_exact=True) if curves else None


def throughput(log: RunLog) -> Figure | None:
    """Steps a second of training time: validation, checkpoints and breaks are not counted."""
    seen: list[tuple[float, float]] = []
    offset, before = 0.0, 0.0
    for state in log.states:
        seconds = float(cast("float", state.get("training_s", 0.0)))
        if seconds < before:  # the next call counts from nothing
            offset += before
        before = seconds
        seen.append((_at(state), offset + seconds))
    if not seen:
        return None
    # Windows of equal time: a single step says little.
    window = max(seen[-1][1] / _WINDOWS, 1e-9)
    points: list[tuple[float, float]] = []
    x0, s0 = seen[0]
    for x, seconds in seen[1:]:
        if x < x0 or seconds < s0:
            x0, s0 = x, seconds
        elif seconds - s0 >= window and x > x0:
            points.append((x, (x - x0) / (seconds - s0)))
            x0, s0 = x, seconds
    return Figure("steps per second", [Curve("steps/s", points)], is_exact=True) if points else None


def memory(log: RunLog) -> Figure | None:
    """What the process held on the host, and the peak on the device."""
    names = {"host": "host", "device_peak": "device, peak"}
    curves: dict[str, Curve] = {}
    for state in log.states:
        for key, size in cast("Mapping[str, int]", state.get("memory", {})).items():
            name = names.get(key, key)
            curves.setdefault(name, Curve(name)).points.append((_at(state), float(size)))
    return Figure("memory", list(curves.values()), is_bytes=True, is_exact=True) if curves else None


def _at(record: Record) -> float:
    return float(cast("int", record.get("at", 0)))


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other), 1e-12)
