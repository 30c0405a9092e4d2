import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import nn

from fulmen_precision import DoublePrecision, FullPrecision, HalfPrecision
from fulmen_precision.true import bfloat16, double, half, single
from fulmen_protocols import (
    PRECISIONS,
    SupportsForwardContext,
    SupportsGradScaling,
    SupportsInputConversion,
    SupportsOutputConversion,
    load,
)

Pair = namedtuple("Pair", ["x", "y"])

CASTING = [
    (HalfPrecision("16-true"), torch.float16),
    (HalfPrecision("bf16-true"), torch.bfloat16),
    (DoublePrecision(), torch.float64),
]


class Net(nn.Module):
    """Makes a tensor of its own in forward, as positional encodings do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.full((8,), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(0.0, 1.0, 8)
        return self.second(torch.tanh(self.first(x) + ramp + self.shift))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)) for _ in range(8)]


@pytest.mark.proves("3.10")
@pytest.mark.parametrize(("precision", "dtype"), CASTING)
def test_training_in_true_precision_equals_a_raw_loop_in_that_dtype_bit_for_bit(precision, dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = Net(), None
    theirs = copy.deepcopy(ours)

    ours = precision.convert_module(ours)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    for batch in batches():
        x, y = precision.convert_input(batch)
        optimizer.zero_grad()
        with precision.forward_context():
            loss = nn.functional.mse_loss(ours(x), y)
        loss.backward()
        optimizer.step()

    theirs.to(dtype)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        torch.set_default_dtype(dtype)
        loss = nn.functional.mse_loss(theirs(x.to(dtype)), y.to(dtype))
        torch.set_default_dtype(torch.float32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    for got, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(got, expected)
    assert ours.steps.dtype == torch.int64, "integer buffers stay"


def test_32_true_offers_no_ability_and_hands_the_module_back() -> None:
    precision = FullPrecision()
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())

    assert precision.convert_module(module) is module
    assert module[1].weight.dtype == torch.bfloat16, "a part made in another dtype on purpose stays"
    for ability in (SupportsForwardContext, SupportsInputConversion, SupportsOutputConversion, SupportsGradScaling):
        assert not isinstance(precision, ability)


@pytest.mark.parametrize(("precision", "dtype"), CASTING)
def test_true_half_and_double_offer_context_and_both_conversions_but_no_scaling(precision, dtype) -> None:
    assert isinstance(precision, SupportsForwardContext)
    assert isinstance(precision, SupportsInputConversion)
    assert isinstance(precision, SupportsOutputConversion)
    assert not isinstance(precision, SupportsGradScaling)
    plan = precision.plan()
    assert (plan["parameter"], plan["compute"], plan["reduction"], plan["scaler"]) == (dtype, dtype, dtype, "none")
    assert plan["output"] == torch.float32


@pytest.mark.proves("3.20")
@pytest.mark.parametrize(("precision", "dtype"), CASTING)
def test_a_context_restores_the_dtype_found_at_entry_not_the_one_at_construction(precision, dtype) -> None:
    context = precision.forward_context()
    try:
        torch.set_default_dtype(torch.float64)
        with context:
            assert torch.get_default_dtype() == dtype
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.proves("3.20")
def test_a_context_restores_the_dtype_when_the_block_raises_and_may_be_nested() -> None:
    context = DoublePrecision().init_context()
    with context:
        with context:
            assert nn.Linear(1, 1).weight.dtype == torch.float64
        assert torch.get_default_dtype() == torch.float64
    with pytest.raises(KeyError), context:
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.proves("3.10", "3.19")
@pytest.mark.parametrize(("precision", "dtype"), [*CASTING, (FullPrecision(), torch.float32)])
def test_modules_and_tensors_made_in_the_init_context_have_the_parameter_dtype(precision, dtype) -> None:
    with precision.init_context():
        module, tensor = nn.Linear(2, 2), torch.zeros(3)
    assert module.weight.dtype == tensor.dtype == dtype == precision.plan()["parameter"]


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str


@pytest.mark.proves("3.10")
def test_input_conversion_enters_every_kind_of_collection_and_leaves_other_leaves_alone() -> None:
    precision = HalfPrecision("bf16-true")
    labels = torch.tensor([1, 2])
    text = "bf16"
    data = {
        "pair": Pair(torch.ones(2), labels),
        "list": [torch.ones(1), (torch.ones(1), None)],
        "sample": Sample(torch.ones(2), text),
        "ordered": OrderedDict(b=torch.ones(1), a=3),
        "complex": torch.ones(1, dtype=torch.complex64),
        "read_only": MappingProxyType({"z": torch.ones(1)}),
    }

    result = precision.convert_input(data)

    assert type(result["pair"]) is Pair
    assert result["pair"].x.dtype == torch.bfloat16
    assert result["pair"].y is labels
    assert result["list"][0].dtype == result["list"][1][0].dtype == torch.bfloat16
    assert type(result["list"][1]) is tuple
    assert result["sample"].image.dtype == torch.bfloat16
    assert result["sample"].name is text
    assert list(result["ordered"]) == ["b", "a"]
    assert type(result["ordered"]) is OrderedDict
    assert result["complex"] is data["complex"]
    assert result["read_only"]["z"].dtype == torch.bfloat16
    assert data["pair"].x.dtype == torch.float32, "the caller's batch is not changed"
    assert data["sample"].image.dtype == torch.float32


def test_input_conversion_returns_the_same_object_when_there_is_nothing_to_cast() -> None:
    data = {"a": [torch.ones(1, dtype=torch.float64), (torch.tensor([1]),)], "b": Sample(torch.tensor([2]), "x")}
    assert DoublePrecision().convert_input(data) is data


def test_input_conversion_keeps_packed_sequences_usable() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    converted = DoublePrecision().convert_input(packed)
    output, _ = nn.LSTM(2, 4).double()(converted)
    assert output.data.dtype == torch.float64


def test_outputs_are_cast_back_to_the_default_dtype_of_the_moment() -> None:
    precision = HalfPrecision("16-true")
    output = (torch.ones(2, dtype=torch.float16), torch.tensor([1]))
    assert precision.convert_output(output)[0].dtype == torch.float32
    with DoublePrecision().init_context():
        assert precision.convert_output(output)[0].dtype == torch.float64 == precision.plan()["output"]


@pytest.mark.proves("3.1")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("64-true", DoublePrecision),
        ("32-true", FullPrecision),
        ("16-true", HalfPrecision),
        ("bf16-true", HalfPrecision),
    ],
)
def test_each_true_precision_is_found_by_its_name_and_knows_it(name, kind) -> None:
    precision = load(PRECISIONS, name, device="cpu")
    assert type(precision) is kind
    assert precision.precision == name


def test_the_factories_take_any_device_but_64_bit_refuses_mps() -> None:
    for factory in (single, half, bfloat16):
        factory(device="mps")
    with pytest.raises(ValueError, match="MPS has no float64"):
        double(device="mps")


def test_an_unknown_half_precision_names_the_closest_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'bf16-true'"):
        HalfPrecision("bf16true")
