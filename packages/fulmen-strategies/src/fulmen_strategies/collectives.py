"""Collectives over torch.distributed, equal in meaning on every backend (gloo knows no bool, NCCL no CPU tensor)."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # pyright: ignore[reportPrivateUsage]

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch._C._distributed_c10d import Store

    from fulmen_protocols.collectives import ReduceOp

__all__ = ["TorchCollectives"]

T = TypeVar("T")

# Number of patient barriers so far: every rank counts alike, because every rank must call every collective.
_patience = itertools.count()


class TorchCollectives:
    """Communication among the ranks of ``group``.

    Tensors may live on any device: those that the backend cannot reach travel through ``device`` and come back.

    Args:
        device: the device of this process.
        group: the ranks that speak to each other; ``None``: all of them.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._device = device
        self._group = group
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)

    @property
    def rank(self) -> int:
        """Index of this process in the group."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes in the group."""
        return self._world_size

    def barrier(self, name: str = "") -> None:
        """Return when every rank has come here; a failure carries ``name`` as a note."""
        try:
            if self._device.type == "cuda":
                dist.barrier(self._group, device_ids=[self._device.index or 0])
            else:
                dist.barrier(self._group)
        except RuntimeError as error:
            error.add_note(f"raised on rank {self._rank} while it waited at the barrier {name!r}")
            raise

    def patient_barrier(self, name: str = "") -> None:
        """As ``barrier``, but without a time limit: one rank may download or preprocess for hours meanwhile.

        The ranks meet in the key-value store, whose waits are cut into slices of one second: Ctrl-C and
        signals are still handled. Only for the group of all ranks.
        """
        store = _get_default_store()
        key = f"fulmen/patient_barrier/{next(_patience)}"
        try:
            if store.add(f"{key}/arrived", 1) == self._world_size:
                store.set(f"{key}/open", "1")
            while not store.check([f"{key}/open"]):
                _wait_a_second(store, f"{key}/open")
        except RuntimeError as error:
            error.add_note(f"raised on rank {self._rank} while it waited at the patient barrier {name!r}")
            raise

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite ``tensor`` with that of rank ``source`` and return it."""
        wire = self._as_bytes(tensor)
        dist.broadcast(wire, group=self._group, group_src=source)
        if self._rank != source and wire.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(_from_bytes(wire, tensor))
        return tensor

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """A picklable object of rank ``source``."""
        box: list[object] = [value if self._rank == source else None]
        dist.broadcast_object_list(box, group=self._group, device=self._wire_device, group_src=source)
        return cast("T", box[0])

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        """A new tensor combining ``tensor`` over ranks.

        Sums of 16-bit floats are taken in float32 and integer means in int64, so that neither overflows on the way.
        Of bool tensors ``sum`` and ``max`` are "any", ``mean`` (a floor) and ``min`` are "all".

        Raises:
            ValueError: ``op`` is unknown, or orders complex numbers.
        """
        if op not in ("mean", "sum", "min", "max"):
            raise ValueError(f"no reduction is named {op!r}: use 'mean', 'sum', 'min' or 'max'.")
        source = tensor.detach()
        if source.dtype == torch.bool:
            ordered: ReduceOp = "max" if op in ("sum", "max") else "min"
            return self.all_reduce(source.to(torch.uint8), ordered).to(torch.bool)
        if source.is_complex():
            if op in ("min", "max"):
                raise ValueError(f"complex numbers have no order: {op!r} of {source.dtype} is undefined.")
            return torch.view_as_complex(self.all_reduce(torch.view_as_real(source), op))

        wire = source.to(device=self._wire_device, dtype=_wide(source.dtype), copy=True).contiguous()
        dist.all_reduce(wire, _OPS[op], group=self._group)
        return self._of_wire(wire, op).to(device=tensor.device, dtype=tensor.dtype)

    def begin_all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Callable[[], Tensor]:
        """As ``all_reduce``, begun now. The device waits for it where the result is asked for; with gloo, the host.

        Raises:
            ValueError: ``op`` is unknown, or ``tensor`` does not hold real numbers.
        """
        if op not in _OPS:
            raise ValueError(f"no reduction is named {op!r}: use 'mean', 'sum', 'min' or 'max'.")
        source = tensor.detach()
        if source.dtype == torch.bool or source.is_complex():
            raise ValueError(f"begin_all_reduce takes real numbers, not {source.dtype}: use all_reduce.")
        wire = source.to(device=self._wire_device, dtype=_wide(source.dtype), copy=True).contiguous()
        work = cast("dist.Work | None", dist.all_reduce(wire, _OPS[op], group=self._group, async_op=True))
        device, dtype = tensor.device, tensor.dtype

        def result() -> Tensor:
            if work is not None:
                work.wait()
            return self._of_wire(wire, op).to(device=device, dtype=dtype)

        return result

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        """Stack ``tensor`` of every rank along a new first dimension; with ``differentiable`` gradients flow back."""
        if differentiable and tensor.requires_grad and torch.is_grad_enabled():
            return cast("Tensor", _AllGather.apply(self, tensor))  # type: ignore[no-untyped-call]
        wire = self._as_bytes(tensor)
        gathered = wire.new_empty((self._world_size, *wire.shape))
        dist.all_gather(list(gathered.unbind(0)), wire, group=self._group)
        stacked = gathered if gathered.dtype == tensor.dtype else gathered.view(tensor.dtype)
        return stacked.view(self._world_size, *tensor.shape).to(tensor.device)

    def all_gather_object(self, value: T) -> list[T]:
        """A picklable object of every rank, in rank order."""
        box: list[object] = [None] * self._world_size
        dist.all_gather_object(box, value, group=self._group)
        return cast("list[T]", box)

    def _of_wire(self, wire: Tensor, op: ReduceOp) -> Tensor:
        if op == "mean" and self._world_size > 1:
            wire.div_(self._world_size, rounding_mode=None if wire.is_floating_point() else "floor")
        return wire

    @property
    def _wire_device(self) -> torch.device:
        """Where the backend wants tensors; gloo also takes CUDA tensors, but only by copying them itself."""
        return torch.device("cpu") if dist.get_backend(self._group) == "gloo" else self._device

    def _as_bytes(self, tensor: Tensor) -> Tensor:
        """``tensor``, or a copy, in a form that any backend moves: contiguous, flat bytes where its dtype is exotic."""
        wire = tensor.detach().to(self._wire_device).contiguous()
        return wire if wire.dtype in _COMMON else wire.reshape(-1).view(torch.uint8)


_OPS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
_COMMON = frozenset({torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.int8})


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken."""
    if dtype in _COMMON - {torch.int32, torch.uint8, torch.int8}:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int64


def _from_bytes(wire: Tensor, like: Tensor) -> Tensor:
    return wire if wire.dtype == like.dtype else wire.view(like.dtype).view(like.shape)


def _wait_a_second(store: Store, key: str) -> None:
    try:
        store.wait([key], timedelta(seconds=1))
    except dist.DistStoreError:  # nobody has opened it within this slice; a lost store raises DistNetworkError
        return


class _AllGather(torch.autograd.Function):
    """y = stack over ranks of x; so dL/dx is this rank's row of the sum over ranks of dL/dy."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, collectives: TorchCollectives, tensor: Tensor) -> Tensor:
        ctx.collectives = collectives  # type: ignore[attr-defined]
        return collectives.all_gather(tensor)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[None, Tensor]:
        collectives = cast("TorchCollectives", ctx.collectives)  # type: ignore[attr-defined]
        return None, collectives.all_reduce(grads[0], "sum")[collectives.rank]
