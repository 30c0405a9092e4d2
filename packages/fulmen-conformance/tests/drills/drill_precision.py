"""Minimal correct precisions, and broken ones that PrecisionConformance must catch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from fulmen_conformance import PrecisionConformance
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fulmen_protocols import Precision, PrecisionPlan
    from torch.optim import Optimizer


def cast(data: object, dtype: torch.dtype) -> object:
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, dict):
        return {key: cast(value, dtype) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(cast(value, dtype) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(cast(value, dtype) for value in data)
    return data


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Full:
    """Float32 throughout."""

    def plan(self) -> PrecisionPlan:
        f32 = torch.float32
        return {"parameter": f32, "compute": f32, "reduction": f32, "output": f32, "scaler": "none"}

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(self.plan()["parameter"])

    def init_context(self) -> contextlib.AbstractContextManager[object]:
        return default_dtype(self.plan()["parameter"])


class TrueBf16(Full):
    """Storage and compute in bfloat16."""

    def plan(self) -> PrecisionPlan:
        bf16 = torch.bfloat16
        return {"parameter": bf16, "compute": bf16, "reduction": bf16, "output": torch.float32, "scaler": "none"}

    def forward_context(self) -> contextlib.AbstractContextManager[object]:
        return default_dtype(torch.bfloat16)

    def convert_input(self, data: object) -> object:
        return cast(data, torch.bfloat16)

    def convert_output(self, data: object) -> object:
        return cast(data, torch.float32)


class MixedFp16(Full):
    """Float16 autocast with a scaler."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=100)

    def plan(self) -> PrecisionPlan:
        f32 = torch.float32
        return {"parameter": f32, "compute": torch.float16, "reduction": f32, "output": f32, "scaler": "dynamic"}

    def forward_context(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.float16)

    def convert_input(self, data: object) -> object:
        return cast(data, torch.float32)

    def convert_output(self, data: object) -> object:
        return cast(data, torch.float32)

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> object:
        return self.scaler.step(optimizer)

    def update(self) -> None:
        self.scaler.update()

    def state_dict(self) -> dict[str, object]:
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.scaler.load_state_dict(dict(state_dict))


class TestFull(PrecisionConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def precision(self) -> Precision:
        return Full()


class TestTrueBf16(PrecisionConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def precision(self) -> Precision:
        return TrueBf16()


class TestMixedFp16(PrecisionConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def precision(self) -> Precision:
        return MixedFp16()
