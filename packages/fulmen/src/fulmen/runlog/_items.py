"""What a logger can be given."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Call", "Hyperparameters", "Item", "Row"]


class Row(NamedTuple):
    """Metrics at an x."""

    metrics: Mapping[str, float]
    x: int
    time_s: float
    start: int
    end: int


class Hyperparameters(NamedTuple):
    """Settings of the run."""

    values: Mapping[str, object]
    start: int
    end: int


class Call(NamedTuple):
    """Something else to do with the logger; it is not in the run's log."""

    do: Callable[[], object]
    what: str
    start: int = -1
    end: int = -1


Item = Row | Hyperparameters | Call
