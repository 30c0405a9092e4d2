"""Callbacks that surround the loop's own callables, to see what lies between hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fulmen_fabric.abilities import supports

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fulmen.fit import FitParts
    from fulmen.trainer import Trainer

__all__ = ["WatchesParts", "watched"]


class WatchesParts(Protocol):
    """A callback that wants to surround the parts of a training loop."""

    def watched_parts(self, trainer: Trainer, parts: FitParts) -> FitParts:
        """``parts`` as the loop gets them; called whenever these are composed, for the first time before training."""
        ...


def watched(callbacks: Iterable[object], trainer: Trainer, parts: FitParts) -> FitParts:
    """``parts`` surrounded by each callback that wants to; without one they are the very same."""
    for callback in callbacks:
        if supports(callback, WatchesParts):
            parts = callback.watched_parts(trainer, parts)
    return parts
