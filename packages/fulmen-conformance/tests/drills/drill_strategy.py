"""A minimal correct strategy, and broken ones that StrategyConformance must catch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
import torch.distributed as dist
from fulmen_conformance import StrategyConformance
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fulmen_protocols import ReduceOp, Strategy, Topology
    from torch import Tensor, nn
    from torch.optim import Optimizer


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


class TestSingle(StrategyConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def strategy(self) -> Strategy:
        return Single()


class TestDdp(StrategyConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def strategy(self) -> Strategy:
        return Ddp()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:Ddp"
