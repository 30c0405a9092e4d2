"""float8 precision: its refusals everywhere, its numbers where torchao is installed."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from fulmen_precision import Float8Precision
from fulmen_protocols import BackendUnavailable, MisconfigurationException

has_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _model(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Linear(width, 10))


def _emulated(weights: torch.dtype = torch.float32, **options: Any) -> Float8Precision:
    return Float8Precision(weights, device="cpu", emulate=True, **{"min_features": 16, **options})


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_without_torchao_the_error_says_how_to_get_it() -> None:
    with pytest.raises(BackendUnavailable, match=r"'fp8-mixed' needs torchao.*pip install 'fulmen-precision\[fp8\]'"):
        Float8Precision()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": torch.float16}, r"weights=torch\.float16\. Allowed: torch\.float32, torch\.bfloat16"),
        ({"recipe": "rowwise_with_gw_hp"}, r"rowwise_with_gw_hp' with weights=torch\.float32.*weights=torch\.bfloat16"),
        ({"recipe": "rowise"}, r"recipe='rowise'.*Did you mean 'rowwise'\?"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Float8Precision(**arguments)


@has_torchao
def test_a_device_without_float8_is_refused_with_what_to_use() -> None:
    with pytest.raises(BackendUnavailable, match=r"'fp8-mixed' on device 'cpu'.*Use 'bf16-mixed'"):
        Float8Precision(device="cpu")


@has_torchao
def test_a_run_on_another_device_is_refused_with_what_to_give() -> None:
    with pytest.raises(MisconfigurationException, match=r"device='cuda'.*on 'cpu'\. Give device='cpu'"):
        Float8Precision(emulate=True).check_device("cpu")
    with pytest.raises(BackendUnavailable, match=r"Float8Precision\(device='cpu', emulate=True\)"):
        Float8Precision().check_device("cpu")
    _emulated().check_device("cpu")
    Float8Precision().check_device("cuda")


@has_torchao
def test_layers_too_small_for_float8_to_pay_are_refused_with_their_sizes() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"no linear layer of Sequential is fit.*0 \(64 x 256\).*at least 1024.*bf16-mixed",
    ):
        _emulated(min_features=1024).convert_module(_model())


@has_torchao
def test_only_fitting_layers_are_converted_and_their_names_stay() -> None:
    model, precision = _model(), _emulated(ignore_modules=["2"])
    names = list(model.state_dict())

    converted = precision.convert_module(model)

    assert precision.converted == ("0",)  # 2 is ignored, 3 has ten outputs
    assert list(converted.state_dict()) == names
    assert type(converted[0]).__name__ == "Float8Linear"  # type: ignore[index]
    assert precision.convert_module(converted) is converted  # a second run of the same module


@has_torchao
@pytest.mark.parametrize(
    ("weights", "recipe"),
    [
        (torch.float32, "auto"),
        (torch.float32, "rowwise"),
        (torch.bfloat16, "tensorwise"),
        (torch.bfloat16, "rowwise"),
        (torch.bfloat16, "rowwise_with_gw_hp"),
    ],
)
def test_training_follows_that_in_float32(weights: torch.dtype, recipe: str) -> None:
    """float8 has 3 bits of mantissa: single products are off by some percent, the loss after 60 steps by little."""

    def train(precision: Float8Precision | None) -> float:
        model: nn.Module = _model()
        if precision is not None:
            model = precision.convert_module(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(64, 10, generator=generator) / 8
        for _ in range(60):
            x = torch.randn(64, 64, generator=generator)
            optimizer.zero_grad()
            if precision is None:
                out = model(x)
            else:
                with precision.forward_context():
                    out = model(precision.convert_input(x))
                assert out.dtype is torch.bfloat16
            loss = nn.functional.mse_loss(out.float(), torch.tanh(x @ teacher))
            loss.backward()
            optimizer.step()
        assert {parameter.dtype for parameter in model.parameters()} == {
            torch.float32 if precision is None else weights
        }
        return loss.item()

    exact, ours = train(None), train(_emulated(weights, recipe=recipe))

    assert exact < 0.2
    assert ours == pytest.approx(exact, rel=0.25)


@has_torchao
def test_products_differ_from_float32_as_much_as_float8_does() -> None:
    """e4m3 has 3 bits of mantissa: a rounded operand is off by up to 1/16, a product of two by about 1/12 at most."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    ours = _emulated().convert_module(copy.deepcopy(model))
    x = torch.eye(64)  # every result is one product, so errors do not average out

    error = ((ours(x) - model(x)) / model(x)).abs()

    assert error.max().item() > 0.01
    assert error.quantile(0.9).item() < 1 / 15
