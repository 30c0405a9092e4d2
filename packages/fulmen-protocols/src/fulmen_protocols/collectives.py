"""Collectives: what the processes of a run say to each other.

A seam of its own: metrics and checkpoints need no strategy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Collectives", "ReduceOp", "SupportsBackgroundReduce", "SupportsPatientBarrier"]

ReduceOp = Literal["mean", "sum", "min", "max"]

T = TypeVar("T")


@runtime_checkable
class Collectives(Protocol):
    """Communication among all ranks. Every method must be called by every rank, in the same order."""

    @property
    def rank(self) -> int:
        """This process's index, ``0 <= rank < world_size``."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes; 1 means that every method is the identity."""
        ...

    def barrier(self, name: str = "") -> None:
        """Return when every rank has come here. ``name`` is for error reports. Synchronises host and device."""
        ...

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """``tensor`` of rank ``source``, written in place on the others; same shape and dtype everywhere."""
        ...

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """A picklable object of rank ``source``. Not for the path of a batch."""
        ...

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        """A new tensor combining ``tensor`` over ranks; same shape and dtype on every rank, the input is left alone.

        An integer ``mean`` is the floor of the true mean.
        """
        ...

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        """Stack ``tensor`` of every rank: shape ``(world_size, *tensor.shape)``. All shapes must be equal.

        With ``differentiable`` gradients flow back to each rank's input.
        """
        ...

    def all_gather_object(self, value: T) -> list[T]:
        """A picklable object of every rank, in rank order. Not for the path of a batch."""
        ...


@runtime_checkable
class SupportsBackgroundReduce(Protocol):
    """Collectives that can reduce while the process, or its device, does something else."""

    def begin_all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Callable[[], Tensor]:
        """As ``all_reduce`` of real numbers, begun now; what is returned waits for it and gives the result, once.

        Every rank begins in the same order as all its other collectives, and may change ``tensor`` at once.
        """
        ...


@runtime_checkable
class SupportsPatientBarrier(Protocol):
    """Collectives that can wait without a time limit, while one rank downloads or preprocesses data for hours."""

    def patient_barrier(self, name: str = "") -> None:
        """As ``barrier``, but it never times out and touches no device."""
        ...
