"""Compare what two runs of a project returned, number by number. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterator

TOLERANCE = 1e-6
"""Largest difference of two numbers that still agree, absolute, or relative to the larger one above 1."""
REFUSED = "refused: "
"""How a project's result begins where what it asked for is an error on purpose; the message follows."""


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every plain value of nested dicts and lists, with its place, as ``("losses[2]", 0.5)``."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        yield f"len({path})", len(value)
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def distance(one: object, other: object) -> float:
    """How far two plain values are apart: 0 if they are the same, infinite where one of them is no number."""
    numbers = [float(value) for value in (one, other) if isinstance(value, int | float)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        same = one == other or (len(numbers) == 2 and all(map(math.isnan, numbers)))
        return 0.0 if same else math.inf
    return abs(numbers[0] - numbers[1]) / max(1.0, *map(abs, numbers))


def refusals(result: dict[str, object]) -> dict[str, str]:
    """The results that are refusals, with their messages."""
    texts = {name: value for name, value in result.items() if isinstance(value, str)}
    return {name: text.removeprefix(REFUSED) for name, text in texts.items() if text.startswith(REFUSED)}


def differences(expected: dict[str, object], found: dict[str, object]) -> dict[str, float]:
    """Places at which two results are further apart than ``TOLERANCE``, and how far; refusals are left out."""
    refused = refusals(found)
    ones = dict(leaves({name: value for name, value in expected.items() if name not in refused}))
    others = dict(leaves({name: value for name, value in found.items() if name not in refused}))
    apart = {place: distance(ones.get(place), others.get(place)) for place in ones | others}
    return {place: far for place, far in apart.items() if far > TOLERANCE}
