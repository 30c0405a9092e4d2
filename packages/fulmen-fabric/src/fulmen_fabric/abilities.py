"""Asking a backend for an optional ability, once, when a run is assembled."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from fulmen_protocols import missing_members

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import TypeIs  # typing has it from Python 3.13 on

__all__ = ["supports"]

T = TypeVar("T")


# Callable, not type[T]: a type checker refuses a Protocol as type[T], and every ability is a Protocol.
def supports(backend: object, ability: Callable[..., T]) -> TypeIs[T]:
    """Whether ``backend`` has every member of the protocol ``ability``.

    Unlike ``isinstance`` it runs no property of the backend: some, such as ``collectives``, raise before launch.
    """
    if not isinstance(ability, type):
        raise TypeError(f"ability must be a Protocol class, got {ability!r}.")
    return not missing_members(ability, backend)
