"""What a logger of one's own is made of, where Lightning has it."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from fulmen._silent import DummyExperiment, DummyLogger
from fulmen_fabric import rank_zero_only
from fulmen_loggers import merge_dicts
from fulmen_protocols import Logger

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DummyLogger", "Logger", "merge_dicts", "rank_zero_experiment"]


def rank_zero_experiment(getter: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the getter of a logger's ``experiment``, below ``@property``.

    Rank 0 gets what ``getter`` returns; the other ranks an object that takes every call and does nothing, and
    ``getter`` is not run there.
    """

    @wraps(getter)
    def experiment(self: object) -> Any:
        return getter(self) if rank_zero_only.rank == 0 else DummyExperiment()

    return experiment
