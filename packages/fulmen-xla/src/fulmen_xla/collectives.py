"""XLACollectives: what the replicas of a run say to each other, through torch-xla."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from fulmen_protocols.errors import MisconfigurationException
from fulmen_xla._library import library

if TYPE_CHECKING:
    from torch import Tensor

    from fulmen_protocols.collectives import ReduceOp

__all__ = ["XLACollectives"]

T = TypeVar("T")

_OPERATIONS = {"sum": "REDUCE_SUM", "mean": "REDUCE_SUM", "min": "REDUCE_MIN", "max": "REDUCE_MAX"}


class XLACollectives:
    """``Collectives`` of the replicas that the PJRT runtime knows. A tensor comes back on the device it came from."""

    def __init__(self) -> None:
        self._xm: Any = library("core.xla_model")
        self._runtime: Any = library("runtime")

    @property
    def rank(self) -> int:
        """This replica's index."""
        return int(self._runtime.global_ordinal())

    @property
    def world_size(self) -> int:
        """Number of replicas."""
        return int(self._runtime.world_size())

    def barrier(self, name: str = "") -> None:
        """Run what is recorded, and wait for the others."""
        library().sync()
        self._xm.wait_device_ops()
        self._meet(f"fulmen {name}", b"")

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """``tensor`` of rank ``source``, written in place on the others.

        Raises:
            MisconfigurationException: there is no rank ``source``.
        """
        self._require_rank(source)
        here = self._here(tensor).detach()
        # What the others give counts nothing: a product with 0 would keep their NaNs.
        mine = here.clone() if self.rank == source else torch.zeros_like(here)
        summed: Tensor = self._xm.all_reduce(self._xm.REDUCE_SUM, _as_number(mine))
        with torch.no_grad():
            tensor.copy_(summed.to(tensor.dtype).to(tensor.device))
        library().sync()
        return tensor

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """A picklable object of rank ``source``."""
        self._require_rank(source)
        return cast("T", self._exchange(value if self.rank == source else None)[source])

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        """A new tensor combining ``tensor`` over ranks; an integer ``mean`` is rounded down.

        Raises:
            MisconfigurationException: no such operation.
        """
        if op not in _OPERATIONS:
            raise MisconfigurationException(f"all_reduce got op={op!r}. Allowed: {', '.join(map(repr, _OPERATIONS))}.")
        here = _as_number(self._here(tensor).clone())
        result: Tensor = self._xm.all_reduce(getattr(self._xm, _OPERATIONS[op]), here)
        if op == "mean":
            whole = not (tensor.is_floating_point() or tensor.is_complex())
            result = result.div(self.world_size, rounding_mode="floor") if whole else result / self.world_size
        return result.to(tensor.dtype).to(tensor.device)

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        """Stack ``tensor`` of every rank: shape ``(world_size, *tensor.shape)``."""
        here = self._here(tensor).unsqueeze(0)
        if differentiable:
            gathered: Tensor = library("core.functions").all_gather(here)
        else:
            gathered = self._xm.all_gather(here.detach(), dim=0)
        return gathered.to(tensor.device)

    def all_gather_object(self, value: T) -> list[T]:
        """A picklable object of every rank, in rank order."""
        return self._exchange(value)

    def _exchange(self, value: Any) -> list[Any]:
        # The payloads come from our own replicas.
        told = self._meet("fulmen objects", pickle.dumps(value))
        return [cast("object", pickle.loads(one)) for one in told]

    def _meet(self, tag: str, payload: bytes) -> list[bytes]:
        with warnings.catch_warnings():
            # torch-xla itself calls what it has deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            return cast("list[bytes]", self._xm.rendezvous(tag, payload))

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(library().device())

    def _require_rank(self, source: int) -> None:
        if not 0 <= source < self.world_size:
            raise MisconfigurationException(f"source={source}, but the ranks are 0 to {self.world_size - 1}.")


def _as_number(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32) if tensor.dtype is torch.bool else tensor
