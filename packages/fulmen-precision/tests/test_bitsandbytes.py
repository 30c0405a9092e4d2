"""Quantized layers: refusals everywhere, the rest where bitsandbytes is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from fulmen_precision import BitsandbytesPrecision
from fulmen_protocols import BackendUnavailable, MisconfigurationException

has_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 64))


def _on_cpu(mode: Any, **options: Any) -> BitsandbytesPrecision:
    return BitsandbytesPrecision(mode, device="cpu", **options)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_the_library_the_error_says_how_to_get_it() -> None:
    with pytest.raises(BackendUnavailable, match=r"mode='nf4'.*pip install 'fulmen-precision\[bitsandbytes\]'"):
        BitsandbytesPrecision("nf4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "nf5"}, r"mode='nf5'\. Did you mean 'nf4'\?.*int8-training"),
        ({"mode": "nf4", "dtype": torch.int8}, r"dtype=torch\.int8\. Allowed: torch\.float16"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        BitsandbytesPrecision(**arguments)


@has_library
def test_a_module_without_linear_layers_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"mode='nf4'.*Conv1d has no linear layer"):
        _on_cpu("nf4").convert_module(nn.Conv1d(1, 1, 1))
    with pytest.raises(MisconfigurationException, match=r"outside of ignore_modules=\['0', '3'\]"):
        _on_cpu("nf4", ignore_modules={"0", "3"}).convert_module(_model())


@has_library
def test_a_device_that_is_not_supported_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"'mps': bitsandbytes quantizes on CUDA and on CPUs"):
        BitsandbytesPrecision("nf4", device="mps")


@has_library
@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_close_and_weights_are_small_and_frozen(mode: str) -> None:
    model, precision = _model(), _on_cpu(mode, dtype=torch.float32, ignore_modules={"3"})
    x = torch.randn(16, 64)
    expected = model[0](x).detach()

    converted = precision.convert_module(model)

    layer = converted.get_submodule("0")
    error = (layer(x) - expected).abs().mean() / expected.abs().mean()
    assert error.item() < (0.02 if mode == "int8" else 0.15)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.element_size() * weight.numel() == 64 * 128 // (1 if mode == "int8" else 2)
    assert not weight.requires_grad
    assert type(converted.get_submodule("3")) is nn.Linear
    assert converted.get_submodule("1").weight.dtype is torch.float32


@has_library
@pytest.mark.parametrize("mode", MODES)
def test_what_is_beside_frozen_weights_trains(mode: str) -> None:
    precision = _on_cpu(mode, dtype=torch.float32)
    model = precision.convert_module(_model())
    adapter = nn.Linear(64, 64)
    optimizer = torch.optim.Adam([p for p in (*model.parameters(), *adapter.parameters()) if p.requires_grad], lr=1e-2)
    x, y = torch.randn(32, 64), torch.randn(32, 64)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(adapter(model(x)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.7 * losses[0]


@has_library
def test_int8_training_trains_the_weights_themselves() -> None:
    model = _on_cpu("int8-training", dtype=torch.float32).convert_module(_model())
    weight = model.get_submodule("0").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.requires_grad
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()

    assert not torch.equal(weight, before)


@has_library
@pytest.mark.parametrize("gradients", [False, True])
def test_int8_training_evaluates_as_it_trains(gradients: bool) -> None:
    model = _on_cpu("int8-training", dtype=torch.float32).convert_module(nn.Linear(64, 8))
    x = torch.randn(4, 64)
    expected = model(x).detach()

    with torch.set_grad_enabled(gradients):
        got = model.eval()(x)

    assert torch.equal(got, expected)


@has_library
def test_int8_training_takes_sequences() -> None:
    model = _on_cpu("int8-training", dtype=torch.float32).convert_module(nn.Linear(64, 8))
    x = torch.randn(4, 3, 64)
    model(x.reshape(12, 64)).square().mean().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    out = model(x)
    out.square().mean().backward()

    assert out.shape == (4, 3, 8)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


@has_library
def test_int8_training_sees_an_update_also_while_gradients_are_kept() -> None:
    model = _on_cpu("int8-training", dtype=torch.float32).convert_module(nn.Linear(64, 8))
    x = torch.randn(4, 64)
    before = model(x)
    before.sum().backward()

    with torch.no_grad():
        model.weight.mul_(2)

    bias = model.bias
    assert isinstance(bias, torch.Tensor)
    assert torch.allclose(model(x) - bias, 2 * (before - bias), rtol=1e-3, atol=1e-3)


@has_library
@pytest.mark.parametrize("mode", MODES)
def test_a_packed_checkpoint_gives_the_same_outputs_bit_for_bit(mode: str) -> None:
    precision, x = _on_cpu(mode, dtype=torch.float32), torch.randn(4, 64)
    first = precision.convert_module(_model())
    torch.manual_seed(9)
    other = precision.convert_module(nn.Sequential(*(type(m)() if isinstance(m, nn.ReLU) else m for m in _fresh())))

    other.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})

    assert torch.equal(other(x), first(x))


@has_library
@pytest.mark.parametrize("mode", MODES)
def test_plain_weights_are_quantized_as_they_are_loaded(mode: str) -> None:
    precision, x = _on_cpu(mode, dtype=torch.float32), torch.randn(4, 64)
    expected = precision.convert_module(_model())(x)
    torch.manual_seed(9)
    other = precision.convert_module(nn.Sequential(*_fresh()))

    other.load_state_dict(_model().state_dict())

    assert torch.equal(other(x), expected)


def _fresh() -> list[nn.Module]:
    return [nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 64)]


@has_library
@pytest.mark.parametrize("mode", MODES)
def test_a_model_made_within_the_context_was_never_whole(mode: str) -> None:
    precision, x = _on_cpu(mode, dtype=torch.float32), torch.randn(4, 64)
    torch.manual_seed(0)
    with precision.init_context():
        made = nn.Sequential(*_fresh())
        assert type(made[0]) is not nn.Linear
    assert type(nn.Linear(2, 2)) is nn.Linear

    assert torch.equal(precision.convert_module(made)(x), precision.convert_module(_model())(x))
