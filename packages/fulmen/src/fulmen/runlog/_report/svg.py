"""Line charts as SVG text that takes its colours from the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from fulmen.runlog._report.text import bytes_text, compact, short

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fulmen.runlog._report.figures import Curve, Figure

__all__ = ["COLOURS", "chart"]

COLOURS = 6
"""Colours that the page's style has: ``--c0`` and so on."""

# As wide as a phone shows it, so that letters are drawn in their own size there.
_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30
_DENSE = 120
"""More points than this are drawn thin, with their mean on top."""
_BUCKETS = 160
_WITH_DOTS = 25
_LOG_RATIO = 200.0


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._of(self.low), self._of(self.high)
        return self.start + (self._of(value) - low) / (high - low) * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def chart(figure: Figure) -> str:
    """An ``svg`` element; empty text when no value is finite."""
    finite = [point for curve in figure.curves for point in curve.points if math.isfinite(point[1])]
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x = _Scale(*_widened(min(xs), max(xs), 0.0), _LEFT, _WIDTH - _RIGHT)
    y = _y_scale(ys, figure)
    text: Callable[[float], str] = bytes_text if figure.is_bytes else compact
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_described(figure, ys))}">',
        *_grid(x, y, text, figure.x_label),
    ]
    for index, curve in enumerate(figure.curves):
        parts += _line(curve, x, y, index % COLOURS, smooth=not figure.is_exact)
    if figure.mark is not None and math.isfinite(figure.mark[1]):
        cx, cy = x(figure.mark[0]), y(figure.mark[1])
        parts.append(f'<circle class="best" cx="{cx:.1f}" cy="{cy:.1f}" r="6"><title>best checkpoint</title></circle>')
    parts.append("</svg>")
    return "".join(parts)


def _described(figure: Figure, ys: Sequence[float]) -> str:
    names = ", ".join(curve.name for curve in figure.curves)
    return f"{figure.title}: {names}; from {short(min(ys))} to {short(max(ys))}"


def _widened(low: float, high: float, by: float) -> tuple[float, float]:
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    return low - (high - low) * by, high + (high - low) * by


def _y_scale(ys: list[float], figure: Figure) -> _Scale:
    if figure.is_bytes:
        return _Scale(0.0, max(ys) * 1.08 or 1.0, _HEIGHT - _BOTTOM, _TOP)
    ordered = sorted(ys)
    low, high = ordered[0], ordered[-1]
    if (
        low > 0
        and high / low > _LOG_RATIO
        and ordered[len(ordered) // 2] / low < high / ordered[len(ordered) // 2] * 50
    ):
        return _Scale(low / 1.15, high * 1.15, _HEIGHT - _BOTTOM, _TOP, is_log=True)
    return _Scale(*_widened(low, high, 0.06), _HEIGHT - _BOTTOM, _TOP)


def _grid(x: _Scale, y: _Scale, text: Callable[[float], str], x_label: str) -> list[str]:
    parts: list[str] = []
    for value in _ticks(y, 4, binary=text is bytes_text):
        at = y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(text(value))}</text>')
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for value in _ticks(x, 4):
        if not float(value).is_integer():
            continue
        at = x(value)
        anchor = "end" if at > _WIDTH - 30 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{base + 14}" text-anchor="{anchor}">{escape(compact(value))}</text>')
    parts.append(
        f'<text class="name" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>'
    )
    return parts


def _ticks(scale: _Scale, about: int, *, binary: bool = False) -> list[float]:
    """Round numbers within the scale; of bytes, powers of two."""
    if scale.is_log:
        first, last = math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high))
        every = max((last - first) // about, 1)
        return [10.0**power for power in range(first, last + 1, every)]
    raw = (scale.high - scale.low) / about
    if binary:
        step = 2.0 ** math.ceil(math.log2(raw))
    else:
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(scale.low / step - 1e-9)
    return [n * step for n in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _line(curve: Curve, x: _Scale, y: _Scale, colour: int, *, smooth: bool) -> list[str]:
    points = curve.points
    style = f'style="--c:var(--c{colour})"'
    title = f"<title>{escape(curve.name)}</title>"
    if len(points) > _DENSE:
        extremes, means = _bucketed(points)
        if not smooth:
            path = f'<path class="line" {style} d="{_path(extremes, x, y)}">{title}</path>'
            return [path, *_not_finite(points, x, colour)]
        return [
            f'<path class="line raw" {style} d="{_path(extremes, x, y)}"/>',
            f'<path class="line" {style} d="{_path(means, x, y)}">{title}</path>',
            *_not_finite(points, x, colour),
        ]
    parts = [f'<path class="line" {style} d="{_path(points, x, y)}">{title}</path>']
    if len(points) <= _WITH_DOTS:
        parts += [
            f'<circle class="dot" {style} cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.4">'
            f"<title>{escape(curve.name)}: {escape(short(b))} at {a:.0f}</title></circle>"
            for a, b in points
            if math.isfinite(b)
        ]
    return [*parts, *_not_finite(points, x, colour)]


def _bucketed(
    points: list[tuple[float, float]],
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Lowest and highest point of each of some buckets, so that no spike is lost, and the mean of each."""
    extremes: list[tuple[float, float]] = []
    means: list[tuple[float, float]] = []
    size = math.ceil(len(points) / _BUCKETS)
    for start in range(0, len(points), size):
        part = [point for point in points[start : start + size] if math.isfinite(point[1])]
        if not part:
            extremes.append((points[start][0], math.nan))
            means.append((points[start][0], math.nan))
            continue
        low, high = min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])
        extremes += sorted({low, high})
        means.append((part[len(part) // 2][0], sum(value for _, value in part) / len(part)))
    if size < 4:  # the mean over so few would be as restless as the points
        means = _smoothed(means)
    return extremes, means


def _smoothed(points: list[tuple[float, float]], reach: int = 4) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for index, (at, value) in enumerate(points):
        near = [v for _, v in points[max(index - reach, 0) : index + reach + 1] if math.isfinite(v)]
        found.append((at, sum(near) / len(near) if near and math.isfinite(value) else value))
    return found


def _path(points: list[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    words: list[str] = []
    is_open = False
    for at, value in points:
        if not math.isfinite(value):
            is_open = False
            continue
        words.append(f"{'L' if is_open else 'M'}{x(at):.1f} {y(value):.1f}")
        is_open = True
    return "".join(words)


def _not_finite(points: list[tuple[float, float]], x: _Scale, colour: int) -> list[str]:
    """A mark at the bottom where a value was NaN or infinite."""
    base = _HEIGHT - _BOTTOM
    marks: list[str] = []
    last = -math.inf
    for at, value in points:
        if math.isfinite(value) or not x.low <= at <= x.high:
            continue
        px = x(at)
        if px - last < 3:
            continue
        last = px
        marks.append(
            f'<path class="bad" style="--c:var(--c{colour})" d="M{px - 3:.1f} {base}h6l-3 -6z">'
            f"<title>{escape(short(value))} at {at:.0f}</title></path>"
        )
    return marks
