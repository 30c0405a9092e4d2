"""What the ranks of a DeepSpeed run say to each other."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # pyright: ignore[reportPrivateUsage]

if TYPE_CHECKING:
    from torch import Tensor

    from fulmen_protocols.collectives import ReduceOp

__all__ = ["EngineCollectives"]

T = TypeVar("T")

_OPS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
# Every rank calls every collective, so all ranks count alike.
_patience = itertools.count()
_AS_THEY_ARE = frozenset({torch.float32, torch.float64, torch.int64})


class EngineCollectives:
    """Communication among all ranks of the default process group.

    Args:
        device: this process's, through which tensors travel unless the backend is gloo.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wire = torch.device("cpu") if dist.get_backend() == "gloo" else device
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    def barrier(self, name: str = "") -> None:
        """Return when every rank has come here; a failure carries ``name`` as a note."""
        try:
            if self._device.type == "cuda":
                dist.barrier(device_ids=[self._device.index or 0])
            else:
                dist.barrier()
        except RuntimeError as error:
            if name:
                error.add_note(f"raised while rank {self._rank} waited for the others at barrier {name!r}")
            raise

    def patient_barrier(self, name: str = "") -> None:
        """As ``barrier``, but without a time limit: one rank may be downloading data for hours."""
        store = _get_default_store()
        key = f"fulmen/patient_barrier/{next(_patience)}"
        try:
            if store.add(f"{key}/arrived", 1) == self._world_size:
                store.set(f"{key}/open", "1")
            while not store.check([f"{key}/open"]):
                try:
                    store.wait([f"{key}/open"], timedelta(seconds=1))  # short, so that Ctrl-C is heard meanwhile
                except dist.DistStoreError:
                    continue
        except RuntimeError as error:
            error.add_note(f"raised while rank {self._rank} waited at the patient barrier {name!r}")
            raise

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite ``tensor`` with that of rank ``source`` and return it."""
        wire = _bytes_of(tensor.detach().to(self._wire).contiguous())
        dist.broadcast(wire, src=source)
        if self._rank != source:
            with torch.no_grad():
                tensor.copy_(wire.view(tensor.dtype).view(tensor.shape))
        return tensor

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """A picklable object of rank ``source``."""
        box: list[object] = [value if self._rank == source else None]
        dist.broadcast_object_list(box, src=source, device=self._wire)
        return cast("T", box[0])

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        """A new tensor combining ``tensor`` over ranks; sums are taken in at least 32 bits, integer means floored.

        Raises:
            ValueError: ``op`` is unknown, or orders complex numbers.
        """
        if op not in _OPS:
            raise ValueError(f"no reduction is named {op!r}: use 'mean', 'sum', 'min' or 'max'.")
        source = tensor.detach()
        if source.dtype == torch.bool:
            ordered: ReduceOp = "max" if op in ("sum", "max") else "min"
            return self.all_reduce(source.to(torch.uint8), ordered).to(torch.bool)
        if source.is_complex():
            if op in ("min", "max"):
                raise ValueError(f"complex numbers have no order: {op!r} of {source.dtype} is undefined.")
            return torch.view_as_complex(self.all_reduce(torch.view_as_real(source), op))
        wide = source.dtype
        if wide not in _AS_THEY_ARE:
            wide = torch.float32 if wide.is_floating_point else torch.int64
        wire = source.to(device=self._wire, dtype=wide, copy=True).contiguous()
        dist.all_reduce(wire, _OPS[op])
        if op == "mean" and self._world_size > 1:
            wire.div_(self._world_size, rounding_mode=None if wide.is_floating_point else "floor")
        return wire.to(device=tensor.device, dtype=tensor.dtype)

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        """Stack ``tensor`` of every rank along a new first dimension; with ``differentiable`` gradients flow back."""
        if differentiable and tensor.requires_grad and torch.is_grad_enabled():
            return cast("Tensor", _Gather.apply(self, tensor))  # type: ignore[no-untyped-call]
        wire = _bytes_of(tensor.detach().to(self._wire).contiguous())
        gathered = [torch.empty_like(wire) for _ in range(self._world_size)]
        dist.all_gather(gathered, wire)
        return torch.stack(gathered).view(tensor.dtype).view(self._world_size, *tensor.shape).to(tensor.device)

    def all_gather_object(self, value: T) -> list[T]:
        """A picklable object of every rank, in rank order."""
        box: list[object] = [None] * self._world_size
        dist.all_gather_object(box, value)
        return cast("list[T]", box)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes, which every backend moves."""
    return tensor.reshape(-1).view(torch.uint8)


class _Gather(torch.autograd.Function):
    """y is x of every rank stacked, so dL/dx is this rank's row of dL/dy summed over ranks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, collectives: EngineCollectives, tensor: Tensor) -> Tensor:
        ctx.collectives = collectives  # type: ignore[attr-defined]
        return collectives.all_gather(tensor)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[None, Tensor]:
        collectives = cast("EngineCollectives", ctx.collectives)  # type: ignore[attr-defined]
        return None, collectives.all_reduce(grads[0], "sum")[collectives.rank]
