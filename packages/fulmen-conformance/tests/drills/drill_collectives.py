"""Minimal correct collectives, and broken ones that CollectivesConformance must catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
import torch.distributed as dist
from fulmen_conformance import CollectivesConformance

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_protocols import ReduceOp, Topology
    from torch import Tensor

_OPS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]


class Good:
    def __init__(self, topology: Topology) -> None:
        self.rank, self.world_size = topology.rank, topology.world_size
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{topology.main_address}:{topology.main_port}",
            rank=topology.rank,
            world_size=topology.world_size,
        )

    def barrier(self, name: str = "") -> None:
        dist.barrier()

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        buffer = tensor.contiguous()
        dist.broadcast(buffer, source)
        return tensor.copy_(buffer)

    def broadcast_object(self, value: object, source: int = 0) -> object:
        box = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        out = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, _OPS[op])
        if op == "mean":
            if out.is_floating_point():
                return out.div_(self.world_size)
            return out.div_(self.world_size, rounding_mode="floor")
        return out

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        if differentiable:
            return _Gather.apply(tensor.contiguous())
        with torch.no_grad():
            return _Gather.apply(tensor.detach().contiguous())

    def all_gather_object(self, value: object) -> list[object]:
        parts: list[object] = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts


class TestGood(CollectivesConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:Good"


class TestGoodAlone(CollectivesConformance):
    """One process: every method is the identity."""

    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:Good"

    @pytest.fixture
    def num_processes(self) -> int:
        return 1
