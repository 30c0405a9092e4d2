"""Minimal correct precisions, and broken ones that PrecisionConformance must catch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fulmen_conformance import PrecisionConformance

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

    from fulmen_protocols import Precision, PrecisionPlan


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


def broken(backend: type[Full], *tests: str) -> type[PrecisionConformance]:
    """A subclass of the kit for ``backend``, which exactly ``tests`` must catch."""

    class Drill(PrecisionConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def precision(self) -> Precision:
            return backend()

    return Drill


class ForAnotherDevice(Full):
    def check_device(self, kind: str) -> None:
        if kind != "meta":
            raise ValueError(f"no run on {kind!r}")


class PlanOfText(Full):
    def plan(self) -> PrecisionPlan:
        return super().plan() | {"output": "float32"}


class PlanHidesScaler(MixedFp16):
    def plan(self) -> PrecisionPlan:
        return super().plan() | {"scaler": "none"}


class LeavesParameters(TrueBf16):
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class CastsIntegers(Full):
    def convert_module(self, module: nn.Module) -> nn.Module:
        for name, buffer in list(module.named_buffers()):
            setattr(module, name, buffer.float())
        return module


class KeepsDefaultDtype(TrueBf16):
    """Puts the default dtype back only when nothing went wrong."""

    def init_context(self) -> contextlib.AbstractContextManager[object]:
        @contextlib.contextmanager
        def context() -> Iterator[None]:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            yield
            torch.set_default_dtype(before)

        return context()


class NoInitContext(TrueBf16):
    def init_context(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class NoAutocast(MixedFp16):
    def forward_context(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class CastsLabels(TrueBf16):
    def convert_input(self, data: object) -> object:
        if isinstance(data, Tensor):
            return data.to(torch.bfloat16)
        if isinstance(data, dict):
            return {key: self.convert_input(value) for key, value in data.items()}
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*(self.convert_input(value) for value in data))
        return type(data)(self.convert_input(v) for v in data) if isinstance(data, (list, tuple)) else data


class FlattensNamedTuples(TrueBf16):
    def convert_output(self, data: object) -> object:
        out = cast(data, torch.float32)
        return out | {"b": tuple(out["b"])} if isinstance(out, dict) else out


class Detaches(TrueBf16):
    def convert_output(self, data: object) -> object:
        return data.detach().float().requires_grad_() if isinstance(data, Tensor) else cast(data, torch.float32)


class HalvesLoss(MixedFp16):
    def scale(self, loss: Tensor) -> Tensor:
        return super().scale(loss) * 0.5


class UnscalesTooLate(MixedFp16):
    def unscale(self, optimizer: Optimizer) -> None:
        pass


class UnscalesTwice(MixedFp16):
    def step(self, optimizer: Optimizer) -> object:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self.scaler._per_optimizer_states[id(optimizer)]["stage"].name == "UNSCALED":
                    parameter.grad.mul_(0.5)
        return super().step(optimizer)


class StepsAnyway(MixedFp16):
    def __init__(self) -> None:
        super().__init__()
        self.unscaled: set[Optimizer] = set()

    def unscale(self, optimizer: Optimizer) -> None:
        if optimizer not in self.unscaled:
            self.scaler.unscale_(optimizer)
        self.unscaled.add(optimizer)

    def step(self, optimizer: Optimizer) -> object:
        self.unscale(optimizer)
        self.unscaled.clear()
        return optimizer.step()


class ForgetsScale(MixedFp16):
    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        pass


class PartOfAScaler(TrueBf16):
    def scale(self, loss: Tensor) -> Tensor:
        return loss


class TestPlanOfText(PrecisionConformance):
    caught_by: ClassVar[set[str]] = {"test_the_plan_names_floating_dtypes_and_the_scaler"}

    @pytest.fixture
    def precision(self) -> Precision:
        return PlanOfText()


TestForAnotherDevice = broken(ForAnotherDevice, "test_the_device_that_it_is_for_is_taken")
TestPlanHidesScaler = broken(PlanHidesScaler, "test_the_plan_says_scaler_exactly_when_there_is_one")
TestLeavesParameters = broken(
    LeavesParameters,
    "test_converted_parameters_have_the_plan_s_dtype",
    "test_matrix_products_run_in_the_plan_s_compute_dtype",
    "test_a_step_changes_the_weights_exactly_as_plain_pytorch_does",
    "test_gradients_and_optimizer_state_have_the_parameter_dtype",
)
TestCastsIntegers = broken(CastsIntegers, "test_converted_parameters_have_the_plan_s_dtype")
TestKeepsDefaultDtype = broken(KeepsDefaultDtype, "test_every_context_leaves_torch_as_it_was")
TestNoInitContext = broken(NoInitContext, "test_new_parameters_and_tensors_have_the_plan_s_dtype")
TestNoAutocast = broken(
    NoAutocast,
    "test_matrix_products_run_in_the_plan_s_compute_dtype",
    "test_a_step_changes_the_weights_exactly_as_plain_pytorch_does",
)
TestCastsLabels = broken(CastsLabels, "test_only_floating_tensors_of_a_batch_are_cast")
TestFlattensNamedTuples = broken(FlattensNamedTuples, "test_outputs_are_cast_to_the_plan_s_output_dtype")
TestDetaches = broken(Detaches, "test_a_cast_output_still_carries_gradients")
TestHalvesLoss = broken(
    HalvesLoss,
    "test_a_step_changes_the_weights_exactly_as_plain_pytorch_does",
    "test_unscaling_divides_the_gradients_in_place",
    "test_a_scaled_step_uses_true_gradients_once",
)
TestUnscalesTooLate = broken(UnscalesTooLate, "test_unscaling_divides_the_gradients_in_place")
TestUnscalesTwice = broken(
    UnscalesTwice,
    "test_a_step_changes_the_weights_exactly_as_plain_pytorch_does",
    "test_a_scaled_step_uses_true_gradients_once",
)
TestStepsAnyway = broken(StepsAnyway, "test_a_step_with_a_gradient_that_is_not_finite_is_skipped")
TestForgetsScale = broken(ForgetsScale, "test_the_scaler_s_state_is_plain_and_comes_back")
TestPartOfAScaler = broken(PartOfAScaler, "test_each_ability_is_whole_or_absent")
