"""Remembering what was made for somebody, for as long as they hold it."""

from __future__ import annotations

from typing import TypeVar
from weakref import WeakSet

__all__ = ["InUse"]

T = TypeVar("T")


class InUse(WeakSet[T]):
    """What somebody still holds. It goes to another process empty: there, nobody holds what was made here."""

    def __reduce__(self) -> tuple[type[InUse[T]], tuple[()]]:
        return type(self), ()
