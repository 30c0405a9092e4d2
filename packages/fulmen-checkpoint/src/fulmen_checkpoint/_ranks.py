"""Ranks that do one thing together: each does its part, all learn how it went, and an error of one is raised by all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

import torch.distributed as dist

from fulmen_protocols.errors import CheckpointError, FulmenError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Ranks", "Results"]

T = TypeVar("T")


class Results(NamedTuple, Generic[T]):
    """What a step gave."""

    mine: T
    all: list[T]
    """By rank; ``mine`` is this very object in it."""


class Ranks:
    """The processes of a group. Without one: this process alone, and no communication."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, communicate: bool = True) -> None:
        self._group = group
        self._together = communicate and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self._together else 0
        self.size = dist.get_world_size(group) if self._together else 1

    @classmethod
    def alone(cls) -> Ranks:
        """This process, whatever others there are."""
        return cls(communicate=False)

    def together(self, what: str, part: Callable[[], T]) -> Results[T]:
        """Every rank does its part; returns all results. An error of any rank is raised on every rank."""
        mine, error = _attempt(part)
        if self.size == 1:
            if error is not None:
                raise error
            return Results(cast("T", mine), [cast("T", mine)])
        shared: list[object] = [None] * self.size
        dist.all_gather_object(shared, (mine, _told(error)), group=self._group)
        outcomes = cast("list[tuple[T, str | None]]", shared)
        self._raise_first(what, error, [told for _, told in outcomes])
        results = [result for result, _ in outcomes]
        results[self.rank] = cast("T", mine)
        return Results(cast("T", mine), results)

    def from_first(self, what: str, part: Callable[[], T]) -> T:
        """Rank 0 does it; returns its result on every rank. Its error is raised on every rank."""
        mine, error = _attempt(part) if self.rank == 0 else (None, None)
        if self.size == 1:
            if error is not None:
                raise error
            return cast("T", mine)
        shared: list[object] = [(mine, _told(error))]
        dist.broadcast_object_list(shared, group=self._group, group_src=0)
        result, told = cast("tuple[T, str | None]", shared[0])
        self._raise_first(what, error, [told])
        return cast("T", mine) if self.rank == 0 else result

    def _raise_first(self, what: str, own: BaseException | None, told: list[str | None]) -> None:
        if own is not None:
            raise own
        for rank, text in enumerate(told):
            if text is not None:
                raise CheckpointError(f"rank {rank} failed ({what}): {text}")


def _attempt(part: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return part(), None
    except Exception as error:  # noqa: BLE001 - told to the other ranks, then raised
        return None, error


def _told(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, FulmenError) else f"{type(error).__name__}: {error}"
