"""Minimal correct collectives, and broken ones that CollectivesConformance must catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
import torch.distributed as dist

from fulmen_conformance import CollectivesConformance

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fulmen_protocols import ReduceOp, Topology

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


class TestBegins(CollectivesConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:Begins"


class TestGoodAlone(CollectivesConformance):
    """One process: every method is the identity."""

    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:Good"

    @pytest.fixture
    def num_processes(self) -> int:
        return 1


def broken(backend: str, *tests: str, hangs_after_s: float = 60.0) -> type[CollectivesConformance]:
    """A subclass of the kit for the class named ``backend``, which exactly ``tests`` must catch."""

    class Drill(CollectivesConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def factory(self) -> str:
            return f"{__file__}:{backend}"

        @pytest.fixture
        def timeout_s(self) -> float:
            return hangs_after_s

    return Drill


class NoBarrier(Good):
    def barrier(self, name: str = "") -> None:
        pass


class AlwaysFromZero(Good):
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return super().broadcast(tensor, 0)

    def broadcast_object(self, value: object, source: int = 0) -> object:
        return super().broadcast_object(value, 0)


class BroadcastsACopy(Good):
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return super().broadcast(tensor.clone(), source)


class ReducesInPlace(Good):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        return tensor.copy_(super().all_reduce(tensor, op))


class LocalReduce(Good):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        return tensor.clone()


class DefaultsToSum(Good):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        return super().all_reduce(tensor, op)


class TruncatesIntegers(Good):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        if op == "mean" and not tensor.is_floating_point():
            return super().all_reduce(tensor, "sum").div_(self.world_size, rounding_mode="trunc")
        return super().all_reduce(tensor, op)


class ReducesInFloat32(Good):
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        out = super().all_reduce(tensor, op)
        return out.float() if out.is_floating_point() else out


class Begins(Good):
    """Also offers ``begin_all_reduce``."""

    def begin_all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Callable[[], Tensor]:
        out = tensor.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(out, _OPS[op], async_op=True)

        def result() -> Tensor:
            work.wait()
            return out.div_(self.world_size) if op == "mean" else out

        return result


class BeginsWithoutACopy(Begins):
    def begin_all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Callable[[], Tensor]:
        return lambda: self.all_reduce(tensor, op)


class BeginsAlone(Begins):
    def begin_all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Callable[[], Tensor]:
        out = tensor.clone()
        return lambda: out


class Concatenates(Good):
    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        out = super().all_gather(tensor, differentiable=differentiable)
        return out.flatten(0, 1) if out.dim() > 1 else out


class AlwaysDifferentiable(Good):
    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        return super().all_gather(tensor, differentiable=True)


class AveragesGradients(Good):
    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        if differentiable:
            tensor = tensor / self.world_size + (tensor - tensor / self.world_size).detach()
        return super().all_gather(tensor, differentiable=differentiable)


class Reversed(Good):
    def all_gather_object(self, value: object) -> list[object]:
        return super().all_gather_object(value)[::-1]


class RankOneLeavesEarly(Good):
    """Rank 1 skips a collective: the others hang, and the kit must say so within its time limit."""

    def broadcast_object(self, value: object, source: int = 0) -> object:
        return value if self.rank == 1 and source == 0 else super().broadcast_object(value, source)


class CannotBeMade(Good):
    def __init__(self, topology: Topology) -> None:
        raise OSError("libacme.so is missing")


_ALL = {name for name in dir(CollectivesConformance) if name.startswith("test_")} - {"test_nothing_is_switched_off"}
_GATHERS = (
    "test_all_gather_stacks_in_rank_order",
    "test_all_gather_sums_the_gradients_of_all_ranks",
)
TestNoBarrier = broken("NoBarrier", "test_a_barrier_holds_until_the_last_rank_has_come")
TestAlwaysFromZero = broken(
    "AlwaysFromZero",
    "test_broadcast_writes_the_source_s_tensor_in_place",
    "test_broadcast_object_gives_the_source_s_object",
)
TestBroadcastsACopy = broken(
    "BroadcastsACopy",
    "test_broadcast_writes_the_source_s_tensor_in_place",
    "test_broadcast_writes_through_views",
)
TestReducesInPlace = broken(
    "ReducesInPlace",
    "test_all_reduce_is_the_formula_and_leaves_its_input",
    "test_an_integer_mean_is_the_floor_of_the_true_mean",
)
TestLocalReduce = broken(
    "LocalReduce",
    "test_all_reduce_is_the_formula_and_leaves_its_input",
    "test_all_reduce_means_mean_unless_told_otherwise",
    "test_an_integer_mean_is_the_floor_of_the_true_mean",
    "test_all_reduce_keeps_the_dtype",
    "test_all_reduce_takes_views",
)
TestDefaultsToSum = broken("DefaultsToSum", "test_all_reduce_means_mean_unless_told_otherwise")
TestTruncatesIntegers = broken("TruncatesIntegers", "test_an_integer_mean_is_the_floor_of_the_true_mean")
TestReducesInFloat32 = broken("ReducesInFloat32", "test_all_reduce_keeps_the_dtype")
TestBeginsWithoutACopy = broken(
    "BeginsWithoutACopy", "test_a_reduction_that_is_begun_gives_the_same_when_it_is_asked_for"
)
TestBeginsAlone = broken("BeginsAlone", "test_a_reduction_that_is_begun_gives_the_same_when_it_is_asked_for")
TestConcatenates = broken("Concatenates", *_GATHERS)
TestAlwaysDifferentiable = broken("AlwaysDifferentiable", "test_all_gather_carries_no_gradient_unless_asked")
TestAveragesGradients = broken("AveragesGradients", "test_all_gather_sums_the_gradients_of_all_ranks")
TestReversed = broken("Reversed", "test_all_gather_object_lists_in_rank_order")
TestRankOneLeavesEarly = broken(
    "RankOneLeavesEarly", "test_broadcast_object_gives_the_source_s_object", hangs_after_s=8.0
)
TestCannotBeMade = broken("CannotBeMade", *_ALL)
