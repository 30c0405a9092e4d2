"""A minimal correct strategy of several processes, and broken ones that StrategyConformance must catch."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fulmen_conformance import StrategyConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fulmen_protocols import ReduceOp, Strategy, Topology


class Single:
    """One device, nothing more than the protocol asks."""

    def __init__(self) -> None:
        self.root_device = torch.device("meta")

    def setup_environment(self, topology: Topology) -> None:
        self.root_device = topology.device

    def module_context(self, *, empty: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.root_device)

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        return optimizers

    def teardown(self) -> None:
        pass


class _Group:
    """Collectives just good enough for the strategy kit."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def barrier(self, name: str = "") -> None:
        dist.barrier()

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        dist.broadcast(tensor, source)
        return tensor

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        out = tensor.clone()
        dist.all_reduce(out)
        return out

    def broadcast_object(self, value: object, source: int = 0) -> object:
        box = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def all_gather_object(self, value: object) -> list[object]:
        parts: list[object] = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts


class _BoundMethod:
    """Runs another method of the wrapped module through the wrapper's ``forward``."""

    def __init__(self, placed: nn.Module, name: str) -> None:
        self.placed, self.name = placed, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        inner = self.placed.module
        own_forward = inner.forward
        method = getattr(inner, self.name)

        def redirected(*args: object, **kwargs: object) -> object:
            inner.forward = own_forward
            return method(*args, **kwargs)

        inner.forward = redirected
        try:
            return self.placed(*args, **kwargs)
        finally:
            inner.__dict__.pop("forward", None)


class Ddp(Single):
    """Replicas on several processes, with the abilities that DDP can have."""

    launcher = "local"

    def setup_environment(self, topology: Topology) -> None:
        super().setup_environment(topology)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{topology.main_address}:{topology.main_port}",
            rank=topology.rank,
            world_size=topology.world_size,
        )

    @property
    def collectives(self) -> _Group:
        return _Group()

    def place(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module.to(self.root_device))

    def place_for_inference(self, module: nn.Module) -> nn.Module:
        for value in module.state_dict().values():
            dist.broadcast(value, 0)
        return module.to(self.root_device)

    def no_sync(self, module: nn.Module) -> contextlib.AbstractContextManager[object]:
        return module.no_sync()

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        return _BoundMethod(placed, name)

    def clip_grad_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        *,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm, norm_type, error_if_nonfinite)

    def clip_grad_value(self, module: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        torch.nn.utils.clip_grad_value_(module.parameters(), clip_value)

    def teardown(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(0.1)  # gloo's threads need the GIL to drop what they hold


class TestDdp(StrategyConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def strategy(self) -> Strategy:
        return Ddp()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:Ddp"


def broken(backend: type[Ddp], *tests: str, hangs_after_s: float = 60.0) -> type[StrategyConformance]:
    """A subclass of the kit for ``backend``, which exactly ``tests`` must catch."""

    class Drill(StrategyConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def strategy(self) -> Strategy:
            return backend()

        @pytest.fixture
        def factory(self) -> str:
            return f"{__file__}:{backend.__name__}"

        @pytest.fixture
        def timeout_s(self) -> float:
            return hangs_after_s

    return Drill


class NoReduction(Ddp):
    """Broadcasts the weights and then trains on its own."""

    def place(self, module: nn.Module) -> nn.Module:
        for value in module.state_dict().values():
            dist.broadcast(value, 0)
        return Alone(module)


class Alone(torch.nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def no_sync(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def forward(self, *args: object) -> object:
        return self.module(*args)


class NobodyBroadcasts(Ddp):
    def place(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module, init_sync=False)

    def place_for_inference(self, module: nn.Module) -> nn.Module:
        return module


class SyncsAnyway(Ddp):
    def no_sync(self, module: nn.Module) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class BindsTheOriginal(Ddp):
    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        return getattr(placed.module, name)


class RankPlusOne(Ddp):
    @property
    def collectives(self) -> _Group:
        group = _Group()
        group.rank = (group.rank + 1) % group.world_size
        return group


class EveryRankReadsPartZero(Ddp):
    data_parallel_rank = 0

    @property
    def data_parallel_size(self) -> int:
        return dist.get_world_size()


class HangsOnOneRank(Ddp):
    def place_for_inference(self, module: nn.Module) -> nn.Module:
        if dist.get_rank() == 0 and dist.get_world_size() > 1:
            dist.barrier()
            dist.barrier()
        return module


class SlowToJoin(Ddp):
    """Is right, and on one rank still busy with the store of rank 0 when the others have joined."""

    def setup_environment(self, topology: Topology) -> None:
        super().setup_environment(topology)
        if topology.rank == 1:
            time.sleep(0.5)
            dist.distributed_c10d._get_default_store().set("here", "1")


TestSlowToJoin = broken(SlowToJoin)


class TestNoFactory(StrategyConformance):
    """A strategy of several processes without `factory` is not skipped over."""

    caught_by: ClassVar[set[str]] = {
        "test_every_rank_knows_its_place",
        "test_its_collectives_reach_every_rank",
        "test_replicas_start_with_the_weights_of_rank_zero",
        "test_training_on_several_ranks_follows_the_mean_gradient",
        "test_ranks_end_with_the_same_weights_bit_for_bit",
        "test_within_no_sync_gradients_stay_local",
        "test_a_bound_method_reduces_gradients_too",
        "test_clipping_uses_the_norm_of_the_whole_gradient",
        "test_inference_uses_the_weights_of_rank_zero",
        "test_full_state_is_whole_on_rank_zero_and_loads_again",
        "test_every_part_of_the_data_is_read",
        "test_the_group_can_be_left_and_joined_again",
    }

    @pytest.fixture
    def strategy(self) -> Strategy:
        return Ddp()


TestNoReduction = broken(
    NoReduction,
    "test_training_on_several_ranks_follows_the_mean_gradient",
    "test_ranks_end_with_the_same_weights_bit_for_bit",
    "test_within_no_sync_gradients_stay_local",
    "test_a_bound_method_reduces_gradients_too",
    "test_clipping_uses_the_norm_of_the_whole_gradient",
)
TestNobodyBroadcasts = broken(
    NobodyBroadcasts,
    "test_replicas_start_with_the_weights_of_rank_zero",
    "test_inference_uses_the_weights_of_rank_zero",
)
TestSyncsAnyway = broken(SyncsAnyway, "test_within_no_sync_gradients_stay_local")
TestBindsTheOriginal = broken(BindsTheOriginal, "test_a_bound_method_reduces_gradients_too")
TestRankPlusOne = broken(RankPlusOne, "test_every_rank_knows_its_place")
TestEveryRankReadsPartZero = broken(
    EveryRankReadsPartZero,
    "test_every_part_of_the_data_is_read",
    "test_training_on_several_ranks_follows_the_mean_gradient",
    "test_within_no_sync_gradients_stay_local",
    "test_a_bound_method_reduces_gradients_too",
    "test_clipping_uses_the_norm_of_the_whole_gradient",
)
TestHangsOnOneRank = broken(HangsOnOneRank, "test_inference_uses_the_weights_of_rank_zero", hangs_after_s=12.0)
