"""Stochastic rounding against the real numbers it stands for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fulmen_precision import StochasticHalfPrecision, round_stochastically, stochastic_rounding

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("value", [1.0 + 1 / 1024, -3.1415927, 1e-30, 65504.0, 2**-126])
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    torch.manual_seed(0)
    values = torch.full((200_000,), value)

    rounded = round_stochastically(values).double()

    spacing = 2.0 ** (math.floor(math.log2(abs(value))) - 7)
    # A mean of n draws within one spacing has a standard error below spacing / 2 / sqrt(n).
    assert abs(rounded.mean().item() - float(values[0].double())) < 5 * spacing / 2 / math.sqrt(len(values))
    assert (rounded - values.double()).abs().max().item() < spacing


@settings(max_examples=50, deadline=None)
@given(st.floats(width=32, allow_nan=True, allow_infinity=True))
def test_what_bfloat16_holds_and_what_is_not_finite_stays_itself(value: float) -> None:
    exact = torch.tensor([value]).to(torch.bfloat16)
    if exact.isinf().item() and not math.isinf(value):
        return  # beyond bfloat16's range

    assert torch.equal(round_stochastically(exact.float()).nan_to_num(7.0), exact.nan_to_num(7.0))


def _share_that_moved(rounds: bool, dtype: torch.dtype) -> float:
    torch.manual_seed(1)
    weight = nn.Parameter((torch.randn(4096) / 10).to(dtype))
    start = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1e-5)
    if rounds:
        stochastic_rounding(optimizer)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return (weight.detach() != start).double().mean().item()


def test_updates_too_small_for_bfloat16_move_the_weights_all_the_same() -> None:
    """1,000 steps of 1e-5 are 1e-2 in all, far above the spacing of these weights; each alone is below it."""
    assert _share_that_moved(rounds=False, dtype=torch.bfloat16) < 0.1
    assert _share_that_moved(rounds=False, dtype=torch.float32) == 1.0
    assert _share_that_moved(rounds=True, dtype=torch.bfloat16) > 0.9


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_one_step_is_that_of_float32_rounded_to_a_neighbour(name: str) -> None:
    torch.manual_seed(2)
    narrow = nn.Parameter(torch.randn(257).to(torch.bfloat16))
    wide = nn.Parameter(narrow.detach().float())
    narrow.grad = torch.randn(257).to(torch.bfloat16)
    wide.grad = narrow.grad.float()
    storage = narrow.data_ptr()
    optimizer, reference = stochastic_rounding(_OPTIMIZERS[name]([narrow])), _OPTIMIZERS[name]([wide])

    optimizer.step()
    reference.step()

    assert narrow.dtype is torch.bfloat16
    assert narrow.grad is not None
    assert narrow.grad.dtype is torch.bfloat16
    assert narrow.data_ptr() == storage
    below = wide.detach().view(torch.int32) & -(1 << 16)
    neighbours = torch.stack([below, below + (1 << 16)]).view(torch.float32)
    assert (neighbours == narrow.detach().float()).any(dim=0).all()


def test_a_closure_sees_bfloat16_weights() -> None:
    model = nn.Linear(3, 1).to(torch.bfloat16)
    optimizer = stochastic_rounding(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3))
    seen: list[torch.dtype] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        seen.append(model.weight.dtype)
        loss = model(torch.ones(4, 3, dtype=torch.bfloat16)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]

    assert set(seen) == {torch.bfloat16}
    assert len(seen) >= 3
    assert model.weight.dtype is torch.bfloat16


def test_a_run_goes_on_from_a_saved_state_bit_for_bit() -> None:
    def train(steps: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        model = nn.Linear(8, 8).to(torch.bfloat16)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        StochasticHalfPrecision().prepare_optimizer(optimizer)
        torch.manual_seed(3)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
        else:
            for parameter in model.parameters():
                nn.init.normal_(parameter)
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}

    whole, resumed = train(6), train(3, train(3))

    assert resumed["optimizer"]["state"][0]["exp_avg"].dtype is torch.float32
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name])
    for number, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, resumed["optimizer"]["state"][number][name]) for name, value in state.items())
