"""Members that every logger of Lightning has, for code that calls them on whatever logger there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Everybodys"]

F = TypeVar("F", bound="Callable[..., None]")


def _idle(method: F) -> F:
    """Mark a method that does nothing: a run need not wait for its logger to call it."""
    method.does_nothing = True  # type: ignore[attr-defined]  # functions take attributes
    return method


class Everybodys:
    """Does nothing, where a logger has nothing to do."""

    group_separator = "/"
    """Between the parts of a metric's name."""

    @_idle
    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        """This logger draws no models."""

    @_idle
    def after_save_checkpoint(self, checkpoint_callback: object) -> None:
        """This logger stores no checkpoints."""
