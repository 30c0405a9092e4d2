"""What modules made on the meta device hold once they are placed: the values of their constructors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fulmen_protocols import Topology
from fulmen_strategies import FSDPStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def strategy() -> Iterator[FSDPStrategy]:
    made = FSDPStrategy(auto_wrap_policy={Block})
    made.setup_environment(Topology(devices=(torch.device("cpu"),), main_port=0))
    yield made
    made.teardown()


def placed(strategy: FSDPStrategy, make: Callable[[], nn.Module]) -> nn.Module:
    with strategy.module_context(empty=True):
        model = make()
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(3)
    strategy.place(model)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    every: Any = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor) for name, tensor in every}


def assert_as_made(strategy: FSDPStrategy, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    expected = values(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = values(placed(strategy, make))
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


class Norm(nn.Module):
    """Knows no way to be reset, as those of many libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Angles(nn.Module):
    """A table that no checkpoint has."""

    table: torch.Tensor
    places: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", 1.0 / 100 ** (torch.arange(4) / 4), persistent=False)
        self.register_buffer("places", torch.arange(6), persistent=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), Norm()


def initialise(layer: nn.Module, std: float) -> None:
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        nn.init.normal_(layer.weight, std=std)
    if isinstance(layer, nn.Embedding):
        with torch.no_grad():
            layer.weight[0] = 0.0
    if isinstance(layer, Norm):
        nn.init.ones_(layer.weight)
    if isinstance(layer, Angles):
        layer.table.copy_(1.0 / 100 ** (torch.arange(4) / 4))
        layer.places.copy_(torch.arange(6))


class Model(nn.Module):
    """Initialises its layers as models of Transformers, timm and many scripts do."""

    def __init__(self, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.angles = Angles()
        self.apply(self._init_weights)

    def _init_weights(self, layer: nn.Module) -> None:
        initialise(layer, self.std)


class WithHead(nn.Module):
    """Around a model with a rule of its own; its head shares the embedding's weight."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.body = Model(std=0.5)
        self.head = nn.Linear(4, 8, bias=False)
        self._init_weights(self.head)
        if tied:
            self.head.weight = self.body.embed.weight

    def _init_weights(self, layer: nn.Module) -> None:
        initialise(layer, 7.0)


@pytest.mark.proves("4.20")
def test_layers_get_the_values_of_the_models_own_rule(strategy: FSDPStrategy) -> None:
    assert_as_made(strategy, Model)


@pytest.mark.parametrize("tied", [False, True])
def test_of_several_rules_the_nearest_counts_and_tied_weights_stay_tied(strategy: FSDPStrategy, tied: bool) -> None:
    assert_as_made(strategy, lambda: WithHead(tied=tied))


def test_a_method_of_that_name_that_takes_no_layer_is_let_be(strategy: FSDPStrategy) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def _init_weights(self) -> None:
            nn.init.zeros_(self.inner.weight)

    assert_as_made(strategy, Other)


def test_what_nothing_gives_a_value_is_nan_and_is_named(strategy: FSDPStrategy) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.angles = nn.Linear(4, 4), Norm(), Angles()

    with pytest.warns(UserWarning, match=r"^Angles, Norm held tensors on the meta device .* values are NaN"):
        found = values(placed(strategy, Silent))
    assert found["norm.weight"].isnan().all()
    assert found["angles.table"].isnan().all()
    assert (found["angles.places"] < 0).all(), "no index that would pass for one"
    assert found["inner.weight"].isfinite().all()


def test_a_rule_that_leaves_a_layer_out_does_not_hide_it(strategy: FSDPStrategy) -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.angles = Norm(), Angles()

        def _init_weights(self, layer: nn.Module) -> None:
            if isinstance(layer, Norm):
                nn.init.ones_(layer.weight)

    with pytest.warns(UserWarning, match=r"^Angles held"):
        found = values(placed(strategy, Partial))
    assert torch.equal(found["norm.weight"], torch.ones(4))


def test_a_checkpoint_fills_what_had_no_value(strategy: FSDPStrategy) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

    with pytest.warns(UserWarning, match="Norm held"):
        model = placed(strategy, Silent)
    strategy.load_module_state(model, {"norm.weight": torch.full((4,), 2.0)}, strict=True)
    assert torch.equal(values(model)["norm.weight"], torch.full((4,), 2.0))
