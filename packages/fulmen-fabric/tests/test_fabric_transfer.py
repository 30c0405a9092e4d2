"""Moving nested batches. Devices other than CPU are stood in for by the meta device, which every machine has."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from fulmen_fabric import convert_tensors_to_scalars, map_leaves, move_data_to_device, mover

Pair = collections.namedtuple("Pair", "x y")
META = torch.device("meta")


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    name: str = "b"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    late: int = dataclasses.field(init=False, default=3)


class Movable:
    def __init__(self):
        self.at = "cpu"

    def to(self, device):
        moved = Movable()
        moved.at = str(device)
        return moved


class MovesItself:
    at = "cpu"

    def to(self, device):
        self.at = str(device)


def on_meta(tensor):
    return tensor.device == META


def test_every_container_keeps_its_type_and_every_tensor_moves():
    x = torch.ones(2)
    batch = {
        "list": [x, 1],
        "tuple": (x, "text"),
        "named": Pair(x, None),
        "ordered": collections.OrderedDict(a=x),
        "default": collections.defaultdict(list, a=x),
        "deep": [[{"x": (x,)}]],
        "batch": Batch(x),
        "frozen": Frozen(x),
        "movable": Movable(),
    }
    moved = move_data_to_device(batch, "meta")
    assert on_meta(moved["list"][0])
    assert moved["list"][1] == 1
    assert isinstance(moved["tuple"], tuple)
    assert on_meta(moved["tuple"][0])
    assert isinstance(moved["named"], Pair)
    assert on_meta(moved["named"].x)
    assert isinstance(moved["ordered"], collections.OrderedDict)
    assert isinstance(moved["default"], collections.defaultdict)
    assert moved["default"]["new"] == []
    assert on_meta(moved["deep"][0][0]["x"][0])
    assert on_meta(moved["batch"].x)
    assert moved["batch"].name == "b"
    assert on_meta(moved["frozen"].x)
    assert moved["frozen"].late == 3
    assert moved["movable"].at == "meta"


def test_the_batch_given_is_left_as_it_was():
    x = torch.ones(2)
    batch = {"a": [x], "b": Batch(x), "c": Frozen(x)}
    move_data_to_device(batch, "meta")
    assert batch["a"][0] is x
    assert batch["b"].x is x
    assert batch["c"].x is x


def test_an_object_whose_to_returns_nothing_has_moved_itself():
    batch = MovesItself()
    assert move_data_to_device(batch, "meta") is batch
    assert batch.at == "meta"


@pytest.mark.parametrize("batch", [torch.ones(2), [torch.ones(1), torch.ones(1)], (torch.ones(1),), {"x": [1, "a"]}])
def test_what_is_on_the_cpu_already_comes_back_itself(batch):
    assert mover(torch.device("cpu"))(batch) is batch


@pytest.mark.parametrize("kind", [list, tuple])
def test_the_short_path_of_tensors_in_a_row_moves_them(kind):
    moved = mover(META)(kind([torch.ones(1), torch.ones(2)]))
    assert type(moved) is kind
    assert all(on_meta(one) for one in moved)


def test_a_mixed_row_is_not_mistaken_for_a_row_of_tensors():
    moved = mover(META)([torch.ones(1), {"x": torch.ones(1)}])
    assert on_meta(moved[1]["x"])
    back = mover(torch.device("cpu"))([torch.ones(1), {"x": torch.ones(1)}])
    assert back[1]["x"].device.type == "cpu"


@pytest.mark.parametrize("batch", [torch.ones(1, device="meta"), [torch.ones(1), torch.ones(1, device="meta")]])
def test_what_is_elsewhere_is_brought_to_the_cpu(batch):
    with pytest.raises(NotImplementedError, match="meta"):  # torch has nothing to copy, but was asked to
        mover(torch.device("cpu"))(batch)


def test_classes_strings_and_numbers_are_left_alone():
    batch = [Movable, "text", b"bytes", 1, None]
    assert move_data_to_device(batch, "meta") == batch


def test_a_parameter_keeps_its_class_on_its_own_device():
    parameter = torch.nn.Parameter(torch.ones(1))
    assert move_data_to_device([parameter], "cpu")[0] is parameter


def test_map_leaves_stops_where_it_is_told():
    found = []
    map_leaves(found.append, {"a": [1, 2], "b": 3}, is_leaf=lambda one: isinstance(one, list))
    assert found == [[1, 2], 3]


def test_scalars_come_out_of_one_element_tensors():
    assert convert_tensors_to_scalars({"a": torch.tensor(1.5), "b": [torch.tensor([2])], "c": 3}) == {
        "a": 1.5,
        "b": [2],
        "c": 3,
    }


def test_a_tensor_with_several_elements_is_no_scalar():
    with pytest.raises(ValueError, match=r"shape \(2,\) is no scalar"):
        convert_tensors_to_scalars({"a": torch.ones(2)})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_reach_cuda_and_come_back():
    x = torch.arange(4.0)
    moved = move_data_to_device({"x": [x]}, "cuda")
    assert moved["x"][0].is_cuda
    assert torch.equal(move_data_to_device(moved, "cpu")["x"][0], x)
