"""The kit for precisions."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulmen_conformance._kit import Kit, need, offers, whole_or_absent
from fulmen_conformance._reference import TinyNet, batches, equal_bits, sgd, tiny_net
from fulmen_protocols import (
    Precision,
    SupportsDeviceCheck,
    SupportsForwardContext,
    SupportsGradScaling,
    SupportsInputConversion,
    SupportsLayerReplacement,
    SupportsOptimizerPreparation,
    SupportsOutputConversion,
    missing_members,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from fulmen_protocols import PrecisionPlan

__all__ = ["PrecisionConformance"]

_ABILITIES = (
    SupportsDeviceCheck,
    SupportsForwardContext,
    SupportsInputConversion,
    SupportsOutputConversion,
    SupportsLayerReplacement,
    SupportsOptimizerPreparation,
    SupportsGradScaling,
)


class _Pair(NamedTuple):
    x: object
    y: object


class PrecisionConformance(Kit):
    """Proves a ``Precision``. Give the fixture ``precision``, and ``device`` where it is not for the CPU."""

    @pytest.fixture
    def precision(self) -> Precision:
        """The precision under test, new for each test."""
        raise NotImplementedError("define a fixture `precision` that returns the precision under test")

    @pytest.fixture
    def device(self) -> torch.device:
        """Where the tests compute."""
        return torch.device("cpu")

    def test_it_has_every_member_of_the_protocol(self, precision: Precision) -> None:
        """Three members are required. On failure look at the methods listed as missing."""
        assert missing_members(Precision, precision) == []

    def test_each_ability_is_whole_or_absent(self, precision: Precision) -> None:
        """Half a scaler is never used. On failure add the members listed, or remove their siblings."""
        problems = whole_or_absent(precision, _ABILITIES)
        # Many things have a state_dict: it alone is no attempt at a scaler.
        if any(hasattr(precision, name) for name in ("scale", "unscale", "update")):
            assert problems == []
        else:
            assert [p for p in problems if "SupportsGradScaling" not in p] == []

    def test_the_device_that_it_is_for_is_taken(self, precision: Precision, device: torch.device) -> None:
        """Every run on it would be refused. On failure look at ``check_device``, or at the fixture ``device``."""
        need(precision, SupportsDeviceCheck)
        assert isinstance(precision, SupportsDeviceCheck)

        precision.check_device(device.type)

    def test_the_plan_names_floating_dtypes_and_the_scaler(self, precision: Precision) -> None:
        """A plain dict of five entries. On failure look at ``plan()``: keys, strings in the place of dtypes."""
        plan = precision.plan()

        assert set(plan) - {"optimizer_state"} == {"parameter", "compute", "reduction", "output", "scaler"}
        for dtype in (plan["parameter"], plan["compute"], plan["reduction"], plan["output"]):
            assert isinstance(dtype, torch.dtype)
            assert dtype.is_floating_point
        assert plan["scaler"] in ("none", "dynamic")
        assert precision.plan() == plan

    def test_the_plan_says_scaler_exactly_when_there_is_one(self, precision: Precision) -> None:
        """On failure look at ``plan()["scaler"]`` and at the methods of ``SupportsGradScaling``."""
        assert (precision.plan()["scaler"] == "dynamic") == offers(precision, SupportsGradScaling)

    def test_converted_parameters_have_the_plan_s_dtype(self, precision: Precision, device: torch.device) -> None:
        """Values are rounded once, integers left alone. On failure look at ``convert_module``."""
        original, dtype = tiny_net(device=device), precision.plan()["parameter"]

        converted = precision.convert_module(tiny_net(device=device))

        assert [name for name, _ in converted.named_parameters()] == [name for name, _ in original.named_parameters()]
        for (name, got), before in zip(converted.named_parameters(), original.parameters(), strict=True):
            assert equal_bits(got, before.to(dtype)), f"{name} is {got.dtype}, the plan says {dtype}"
            assert got.requires_grad
        buffers = dict(converted.named_buffers())
        assert buffers["seen"].dtype == torch.int64
        assert buffers["seen"].item() == 7

    def test_new_parameters_and_tensors_have_the_plan_s_dtype(self, precision: Precision, device: torch.device) -> None:
        """On failure look at ``init_context``: it sets torch's default dtype to the plan's parameter dtype."""
        dtype = precision.plan()["parameter"]

        with precision.init_context():
            module = nn.Linear(3, 2, device=device)
            values = (torch.ones(2), torch.tensor(1.5), torch.zeros(1, dtype=torch.int64))

        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert [value.dtype for value in values] == [dtype, dtype, torch.int64]

    def test_every_context_leaves_torch_as_it_was(self, precision: Precision, device: torch.device) -> None:
        """Also after an error inside. On failure look for a default dtype or autocast that is not put back."""
        before = _torch_state(device)

        try:
            for context in (precision.init_context, _forward_context_of(precision)):
                with context():
                    pass
                assert _torch_state(device) == before
                with pytest.raises(KeyError), context():
                    raise KeyError
                assert _torch_state(device) == before
                with context(), context():
                    pass
                assert _torch_state(device) == before
        finally:  # what leaks must not reach the tests that follow
            torch.set_default_dtype(torch.float32)

    def test_matrix_products_run_in_the_plan_s_compute_dtype(self, precision: Precision, device: torch.device) -> None:
        """Seen inside the forward pass. On failure look at ``forward_context`` and ``convert_input``."""
        plan = precision.plan()
        if plan["compute"].itemsize < 2:
            pytest.skip("torch has no plain matrix product in this dtype")
        module = precision.convert_module(tiny_net(device=device))
        seen: list[torch.dtype] = []
        for layer in (module.get_submodule("first"), module.get_submodule("second")):
            layer.register_forward_hook(lambda _layer, _inputs, out: seen.append(out.dtype))

        with _forward_context_of(precision)():
            module(_converted_input(precision, batches(1, device=device)[0][0]))

        assert seen == [plan["compute"]] * 2

    def test_a_step_changes_the_weights_exactly_as_plain_pytorch_does(
        self, precision: Precision, device: torch.device
    ) -> None:
        """Three steps against ``torch.autocast`` or ``module.to``. On failure compare the dtypes of each stage."""
        if precision.plan()["compute"].itemsize < 2:
            pytest.skip("plain PyTorch does not compute in this dtype")
        expected = _plain_steps(precision, device)

        got = _steps_through(precision, device)

        for (name, ours), theirs in zip(got.named_parameters(), expected.parameters(), strict=True):
            assert equal_bits(ours, theirs), f"{name} differs by {(ours - theirs).abs().max().item():.3g}"

    def test_gradients_and_optimizer_state_have_the_parameter_dtype(
        self, precision: Precision, device: torch.device
    ) -> None:
        """On failure look at what ``convert_module`` leaves behind, and at casts that cut the graph."""
        module = _steps_through(precision, device)

        assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {precision.plan()["parameter"]}
        assert all(parameter.grad is not None for parameter in module.parameters())

    def test_a_prepared_optimizer_keeps_its_state_in_the_plan_s_dtype(
        self, precision: Precision, device: torch.device
    ) -> None:
        """Also after its state was saved and loaded. On failure look at ``prepare_optimizer`` and ``plan()``."""
        need(precision, SupportsOptimizerPreparation)
        assert isinstance(precision, SupportsOptimizerPreparation)
        plan = precision.plan()
        dtype = plan.get("optimizer_state", plan["parameter"])
        states: list[Mapping[Tensor, Any]] = []
        saved: dict[str, Any] = {}
        for _ in range(2):
            module = precision.convert_module(tiny_net(device=device))
            optimizer = torch.optim.Adam(module.parameters())
            precision.prepare_optimizer(optimizer)
            if saved:
                optimizer.load_state_dict(saved)
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            saved = optimizer.state_dict()
            states.append(optimizer.state)

        assert {one["exp_avg"].dtype for state in states for one in state.values()} == {dtype}

    def test_only_floating_tensors_of_a_batch_are_cast(self, precision: Precision, device: torch.device) -> None:
        """Nested lists, tuples, dicts, named tuples. On failure look at ``convert_input``: leaves, container types."""
        need(precision, SupportsInputConversion)
        assert isinstance(precision, SupportsInputConversion)
        plan = precision.plan()

        got = _expect_cast(precision.convert_input, device)

        assert got in (plan["parameter"], plan["compute"])

    def test_outputs_are_cast_to_the_plan_s_output_dtype(self, precision: Precision, device: torch.device) -> None:
        """On failure look at ``convert_output``: leaves, container types, the dtype."""
        need(precision, SupportsOutputConversion)
        assert isinstance(precision, SupportsOutputConversion)

        got = _expect_cast(precision.convert_output, device)

        assert got == precision.plan()["output"]

    def test_a_cast_output_still_carries_gradients(self, precision: Precision, device: torch.device) -> None:
        """On failure look for ``detach`` or ``.data`` in ``convert_output``."""
        need(precision, SupportsOutputConversion)
        assert isinstance(precision, SupportsOutputConversion)
        source = torch.ones(3, device=device, dtype=precision.plan()["compute"], requires_grad=True)

        out = precision.convert_output(source)

        assert isinstance(out, Tensor)
        out.sum().backward()  # type: ignore[no-untyped-call, unused-ignore]
        assert source.grad is not None
        assert source.grad.tolist() == [1.0, 1.0, 1.0]

    def test_scaling_multiplies_the_loss(self, precision: Precision, device: torch.device) -> None:
        """On failure look at ``scale``: a positive factor, the same for every loss of an update, with gradient."""
        scaler = _scaler_of(precision)
        factor = _factor(scaler, device)
        loss = torch.tensor(0.5, device=device, requires_grad=True)

        scaled = scaler.scale(loss)

        assert factor > 0
        assert math.isfinite(factor)
        assert scaled.item() == 0.5 * factor
        scaled.backward()  # type: ignore[no-untyped-call, unused-ignore]
        assert loss.grad is not None
        assert loss.grad.item() == factor

    def test_unscaling_divides_the_gradients_in_place(self, precision: Precision, device: torch.device) -> None:
        """Clipping sees true gradients. On failure look at ``unscale``."""
        scaler = _scaler_of(precision)
        weight, optimizer = _weight(device)
        scaler.scale((weight * 0.25).sum()).backward()  # type: ignore[no-untyped-call, unused-ignore]
        assert weight.grad is not None

        scaler.unscale(optimizer)

        assert weight.grad.tolist() == [0.25, 0.25]

    @pytest.mark.parametrize("unscale_first", [True, False])
    def test_a_scaled_step_uses_true_gradients_once(
        self, precision: Precision, device: torch.device, unscale_first: bool
    ) -> None:
        """On failure look at ``step``: it unscales when nobody did, and never twice."""
        scaler = _scaler_of(precision)
        weight, optimizer = _weight(device)

        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale((weight * 0.25).sum()).backward()  # type: ignore[no-untyped-call, unused-ignore]
            if unscale_first:
                scaler.unscale(optimizer)
            scaler.step(optimizer)
            scaler.update()

        assert weight.tolist() == [0.5, 0.5], "1 - 2 * (lr 1 * gradient 0.25)"

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(
        self, precision: Precision, device: torch.device, bad: float
    ) -> None:
        """Weights stay, and the factor shrinks. On failure look at ``step`` and ``update``."""
        scaler = _scaler_of(precision)
        before = _factor(scaler, device)
        weight, optimizer = _weight(device)
        scaler.scale((weight * torch.tensor([bad, 1.0], device=device)).sum()).backward()  # type: ignore[no-untyped-call, unused-ignore]

        scaler.step(optimizer)
        scaler.update()

        assert weight.tolist() == [1.0, 1.0], "the optimizer must not step"
        assert _factor(scaler, device) < before

    def test_the_scaler_s_state_is_plain_and_comes_back(self, precision: Precision, device: torch.device) -> None:
        """A resumed run scales as before. On failure look at ``state_dict``: tensors, a missing factor."""
        scaler = _scaler_of(precision)
        before = _factor(scaler, device)
        state = json.loads(json.dumps(scaler.state_dict()))
        weight, optimizer = _weight(device)
        scaler.scale((weight * math.inf).sum()).backward()  # type: ignore[no-untyped-call, unused-ignore]
        scaler.step(optimizer)
        scaler.update()
        assert _factor(scaler, device) != before

        scaler.load_state_dict(state)

        assert _factor(scaler, device) == before


def _torch_state(device: torch.device) -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.tensor(1.0).device,
    )


def _forward_context_of(precision: Precision) -> Callable[[], AbstractContextManager[object]]:
    """What makes the context of a forward pass: an empty one where ``precision`` offers none."""
    return precision.forward_context if isinstance(precision, SupportsForwardContext) else nullcontext


def _converted_input(precision: Precision, x: Tensor) -> Tensor:
    if not isinstance(precision, SupportsInputConversion):
        return x
    converted = precision.convert_input(x)
    assert isinstance(converted, Tensor)
    return converted


def _steps_through(precision: Precision, device: torch.device) -> nn.Module:
    module = precision.convert_module(tiny_net(device=device))
    optimizer = sgd(module.parameters())
    scaler = precision if isinstance(precision, SupportsGradScaling) else None
    for x, y in batches(3, device=device):
        optimizer.zero_grad()
        with _forward_context_of(precision)():
            out = module(_converted_input(precision, x))
            loss = F.mse_loss(out.float(), y)
        if scaler is None:
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
        else:
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call, unused-ignore]
            scaler.unscale(optimizer)
            scaler.step(optimizer)
            scaler.update()
    return module


def _plain_steps(precision: Precision, device: torch.device) -> nn.Module:
    """What the plan stands for, in plain PyTorch: cast storage, autocast when compute differs, ``GradScaler``."""
    plan: PrecisionPlan = precision.plan()
    module: TinyNet = tiny_net(device=device).to(plan["parameter"])
    optimizer = sgd(module.parameters())
    mixed = plan["compute"] != plan["parameter"]
    scaler = torch.amp.GradScaler(device.type, enabled=plan["scaler"] == "dynamic")
    for x, y in batches(3, device=device):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=plan["compute"]) if mixed else nullcontext():
            loss = F.mse_loss(module(x.to(plan["parameter"])).float(), y)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call, unused-ignore]
        scaler.step(optimizer)
        scaler.update()
    return module


def _expect_cast(convert: object, device: torch.device) -> torch.dtype:
    """Convert a nested batch, check all but the dtype, and return the dtype of its floating tensors."""
    assert callable(convert)
    floats = [torch.ones(2, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    numbers, flags, other = torch.arange(3, device=device), torch.tensor([True], device=device), object()
    batch = {"a": [floats[0], (floats[1], numbers)], "b": _Pair(floats[2], flags), "c": "text", "d": None, "e": other}

    got: Any = convert(batch)  # Any: what comes back is judged line by line

    assert got.__class__ is dict
    assert list(got) == list(batch)
    assert isinstance(got["a"], list)
    assert isinstance(got["a"][1], tuple)
    assert isinstance(got["b"], _Pair), "a named tuple stays one"
    cast_floats: list[Any] = [got["a"][0], got["a"][1][0], got["b"].x]
    assert all(isinstance(value, Tensor) for value in cast_floats)
    assert all(value.tolist() == [1.0, 1.0] for value in cast_floats)
    assert torch.equal(got["a"][1][1], numbers)
    assert got["a"][1][1].dtype == torch.int64
    assert isinstance(got["b"].y, Tensor)
    assert got["b"].y.dtype == torch.bool
    assert (got["c"], got["d"]) == ("text", None)
    assert got["e"] is other
    assert [value.dtype for value in floats] == [torch.float32, torch.float64, torch.bfloat16], "the input is kept"
    dtypes: set[torch.dtype] = {value.dtype for value in cast_floats}
    assert len(dtypes) == 1, f"floating tensors came out as {dtypes}"
    return next(iter(dtypes))


def _scaler_of(precision: Precision) -> SupportsGradScaling:
    need(precision, SupportsGradScaling)
    assert isinstance(precision, SupportsGradScaling)
    return precision


def _factor(scaler: SupportsGradScaling, device: torch.device) -> float:
    return float(scaler.scale(torch.ones((), device=device)).item())


def _weight(device: torch.device) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(2, device=device))
    return weight, torch.optim.SGD([weight], lr=1.0)
