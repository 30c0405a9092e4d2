"""The wrapper that manual optimization steps with."""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from fulmen.optimizer import LightningOptimizer
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Generator


def wrap(optimizer: Optimizer, **kwargs: Any) -> Any:
    return LightningOptimizer(optimizer, lambda closure, **options: optimizer.step(closure, **options), **kwargs)


def stepped(model: nn.Module, optimizer: Any, steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).pow(2).sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def two_equal_models() -> tuple[nn.Linear, nn.Linear]:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.proves("10.15")
def test_it_is_an_instance_of_the_wrapped_optimizers_class() -> None:
    optimizer = Adam([torch.ones(1, requires_grad=True)])
    wrapped = wrap(optimizer)

    assert isinstance(wrapped, Adam)
    assert isinstance(wrapped, LightningOptimizer)
    assert type(wrapped).__name__ == "LightningAdam"
    assert type(wrapped) is type(wrap(Adam([torch.ones(1)])))
    assert wrapped.optimizer is optimizer
    assert wrapped.defaults is optimizer.defaults
    assert wrapped.state is optimizer.state


@pytest.mark.proves("10.15")
def test_training_with_it_changes_weights_as_training_without() -> None:
    one, other = two_equal_models()
    plain, wrapped = Adam(one.parameters(), 0.1), wrap(Adam(other.parameters(), 0.1))

    for got, expected in zip(stepped(other, wrapped), stepped(one, plain), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.proves("10.15")
def test_the_step_function_gets_closure_and_options_and_its_result_is_returned() -> None:
    seen: list[Any] = []
    optimizer = SGD([torch.ones(1)], lr=0.1)

    def step(closure: Any, **options: Any) -> str:
        seen.append((closure, options))
        return "result"

    wrapped = LightningOptimizer(optimizer, step)
    closure = lambda: 1.0  # noqa: E731

    assert wrapped.step(closure, scale=2) == "result"
    assert wrapped.step() == "result"
    assert seen == [(closure, {"scale": 2}), (None, {})]
    with pytest.raises(MisconfigurationException, match="cannot be called"):
        wrapped.step(3)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.proves("10.15")
def test_state_lives_in_the_wrapped_optimizer_whatever_is_done_through_the_wrapper() -> None:
    model, other = two_equal_models()
    optimizer = Adam(model.parameters(), 0.1)
    wrapped = wrap(optimizer)
    stepped(model, wrapped)
    fresh = Adam(other.parameters(), 0.5)
    wrapped_fresh = wrap(fresh)

    wrapped_fresh.load_state_dict(wrapped.state_dict())
    extra = nn.Parameter(torch.ones(1))
    wrapped_fresh.add_param_group({"params": [extra]})
    wrapped_fresh.param_groups[0]["lr"] = 0.3
    wrapped_fresh.marker = "set through the wrapper"

    assert fresh.state_dict()["state"][0]["step"] == 3
    assert fresh.param_groups[0]["lr"] == 0.3
    assert len(fresh.param_groups) == 2
    assert fresh.marker == "set through the wrapper"  # type: ignore[attr-defined]  # its type does not say so
    assert wrapped_fresh.state is fresh.state


def test_a_scheduler_may_be_made_for_the_wrapper() -> None:
    one, other = two_equal_models()
    optimizer = SGD(one.parameters(), lr=1.0)
    wrapped = wrap(optimizer)
    scheduler = StepLR(wrapped, step_size=1, gamma=0.5)

    stepped(one, wrapped, 1)
    scheduler.step()  # would warn, hence fail, if the step had not been seen

    assert optimizer.param_groups[0]["lr"] == 0.5
    plain = SGD(other.parameters(), lr=1.0)
    for got, expected in zip(one.parameters(), stepped(other, plain, 1), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.proves("10.15")
def test_toggle_model_enters_the_contexts_it_was_given() -> None:
    entered: list[str] = []

    @contextmanager
    def context(name: str) -> Generator[None, None, None]:
        entered.append(f"enter {name}")
        yield
        entered.append(f"leave {name}")

    optimizer = SGD([torch.ones(1)], lr=0.1)
    wrapped = wrap(
        optimizer, toggle=lambda o: context("toggle" if o is optimizer else "?"), no_sync=lambda: context("no_sync")
    )

    with wrapped.toggle_model():
        pass
    assert entered == ["enter toggle", "leave toggle"]
    entered.clear()
    with wrapped.toggle_model(sync_grad=False):
        pass
    assert entered == ["enter toggle", "enter no_sync", "leave no_sync", "leave toggle"]


def test_methods_of_the_wrapped_class_work_on_the_wrapped_state() -> None:
    class Switching(SGD):
        def switch(self) -> None:
            self.mode = "eval"

    optimizer = Switching([torch.ones(1)], lr=0.1)
    wrap(optimizer).switch()

    assert optimizer.mode == "eval"


def test_it_can_be_pickled_and_shown() -> None:
    optimizer = SGD([torch.ones(1)], lr=0.1)
    wrapped: Any = LightningOptimizer(optimizer, print)

    copy = pickle.loads(pickle.dumps(wrapped))

    assert isinstance(copy, SGD)
    assert copy.param_groups[0]["lr"] == 0.1
    assert repr(wrapped).startswith("LightningSGD (")
