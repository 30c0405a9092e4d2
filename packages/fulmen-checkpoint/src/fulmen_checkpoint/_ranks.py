"""Ranks that do one thing together: each does its part, all learn how it went, and an error of one is raised by all."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

import torch.distributed as dist

from fulmen_protocols.errors import CheckpointError, FulmenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

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
        self.lost: str | None = None
        """Why they cannot be reached any more."""
        self._group = group
        self._together = communicate and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self._together else 0
        self.size = dist.get_world_size(group) if self._together else 1

    @classmethod
    def alone(cls) -> Ranks:
        """This process, whatever others there are."""
        return cls(communicate=False)

    @classmethod
    def apart(cls, group: dist.ProcessGroup | None, timeout: timedelta) -> Ranks:
        """The processes of ``group`` by a new one, so that a thread may use it beside the others.

        All of them must call this at the same place of their programs. It works by sockets, and on no device.
        """
        members = None if group is None else dist.get_process_group_ranks(group)
        made = dist.new_group(members, timeout, "gloo", use_local_synchronization=members is not None)
        return cls(cast("dist.ProcessGroup", made))

    def leave(self) -> None:
        """Give the group of ``apart`` back."""
        self.lost = "this process has left them"
        with suppress(ValueError, RuntimeError):  # who ends all communication has given this group back too
            dist.destroy_process_group(self._group)

    def together(self, what: str, part: Callable[[], T]) -> Results[T]:
        """Every rank does its part; returns all results. An error of any rank is raised on every rank."""
        mine, error = _attempt(part)
        if self.size == 1:
            if error is not None:
                raise error
            return Results(cast("T", mine), [cast("T", mine)])
        shared: list[object] = [None] * self.size
        self._reach(lambda: dist.all_gather_object(shared, (mine, _told(error)), group=self._group), what, error)
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
        self._reach(lambda: dist.broadcast_object_list(shared, group=self._group, group_src=0), what, error)
        result, told = cast("tuple[T, str | None]", shared[0])
        self._raise_first(what, error, [told])
        return cast("T", mine) if self.rank == 0 else result

    def _reach(self, communicate: Callable[[], object], what: str, own: BaseException | None) -> None:
        """What fails here fails for good: the others may wait for an answer to another question."""
        try:
            if self.lost is None:
                communicate()
                return
        except Exception as error:  # noqa: BLE001 - each backend of torch has errors of its own
            self.lost = str(error).strip().partition("\n")[0]
        if own is not None:
            raise own
        raise CheckpointError(
            f"the other ranks cannot be reached ({what}): {self.lost}. Look at what they say: one of them "
            "has ended, or its storage does not answer."
        )

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
