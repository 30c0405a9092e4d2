"""Saving and loading the user's own objects through real files, and reading them back with plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fulmen_fabric import Fabric
from fulmen_protocols import CheckpointNotFound, MisconfigurationException


class Counter:
    """Anything with a state."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def trained(fabric, seed=0):
    torch.manual_seed(seed)
    module = nn.Linear(2, 2)
    model, opt = fabric.setup(module, torch.optim.Adam(module.parameters()))
    fabric.backward(model(torch.ones(1, 2)).sum())
    opt.step()
    return model, opt


def test_a_state_without_names_is_refused_with_what_to_give(fabric, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"save got a Linear as state. Pass a dict .*'model': model"):
        fabric.save(tmp_path / "a.ckpt", nn.Linear(1, 1))
    assert not (tmp_path / "a.ckpt").exists()


@pytest.mark.proves("5.40", "8.14")
def test_what_was_saved_comes_back_and_plain_entries_are_replaced_in_place(fabric, tmp_path):
    path = tmp_path / "deep" / "a.ckpt"
    model, opt = trained(fabric)
    counter = Counter()
    counter.value = 5
    fabric.save(path, {"model": model, "opt": opt, "counter": counter, "step": 3, "more": [1, 2], "rest": "x"})

    other, other_opt = trained(fabric, seed=1)
    fresh = Counter()
    state = {"model": other, "opt": other_opt, "counter": fresh, "step": 0, "more": None}
    rest = fabric.load(path, state)
    assert rest == {"rest": "x"}
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other_opt.state[other.weight]["exp_avg"], opt.state[model.weight]["exp_avg"])
    assert state["model"] is other
    assert fresh.value == 5
    assert state["step"] == 3
    assert state["more"] == [1, 2]


def test_the_file_is_one_that_plain_torch_reads(fabric, tmp_path):
    model, opt = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "opt": opt, "step": 1})
    plain = torch.load(tmp_path / "a.ckpt", weights_only=True)
    nn.Linear(2, 2).load_state_dict(plain["model"])
    assert plain["step"] == 1


@pytest.mark.proves("5.40", "8.14")
def test_without_a_state_everything_is_returned(fabric, tmp_path):
    model, _ = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "step": 1})
    loaded = fabric.load(tmp_path / "a.ckpt")
    assert loaded["step"] == 1
    assert torch.equal(loaded["model"]["weight"], model.weight)


@pytest.mark.proves("5.40", "8.14")
def test_a_filter_keeps_what_it_says(fabric, tmp_path):
    model, _ = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "n": 1}, filter={"model": lambda key, _: "bias" in key})
    assert list(fabric.load(tmp_path / "a.ckpt")["model"]) == ["bias"]


@pytest.mark.proves("8.14")
@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"modle": lambda *_: True}, "filters for 'modle'"),
        ({"model": "bias"}, "A filter is a function"),
        ({"n": lambda *_: True}, "the filter .* for 'n'"),
    ],
)
def test_a_filter_that_fits_nothing_is_refused_before_writing(fabric, tmp_path, filters, says):
    with pytest.raises(MisconfigurationException, match=says):
        fabric.save(tmp_path / "a.ckpt", {"model": nn.Linear(1, 1), "n": 1}, filter=filters)
    assert not list(tmp_path.iterdir())


@pytest.mark.proves("5.40", "8.14")
def test_a_missing_name_changes_nothing_when_strict(fabric, tmp_path):
    model, _ = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model})
    other, _ = trained(fabric, seed=1)
    before = other.weight.clone()
    with pytest.raises(KeyError, match="not 'step'"):
        fabric.load(tmp_path / "a.ckpt", {"model": other, "step": 0})
    assert torch.equal(other.weight, before)
    state = {"model": other, "step": 0}
    fabric.load(tmp_path / "a.ckpt", state, strict=False)
    assert torch.equal(other.weight, model.weight)
    assert state["step"] == 0


@pytest.mark.proves("8.14")
def test_missing_weights_fail_when_strict_and_are_named_otherwise(fabric, tmp_path):
    model, _ = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model}, filter={"model": lambda key, _: key == "bias"})
    with pytest.raises(RuntimeError, match="weight"):
        fabric.load(tmp_path / "a.ckpt", {"model": model})
    with pytest.warns(UserWarning, match="differ in 'weight'"):
        fabric.load(tmp_path / "a.ckpt", {"model": model}, strict=False)


@pytest.mark.proves("8.14")
def test_raw_files_of_torch_load_into_modules_and_optimizers(fabric, tmp_path):
    source = nn.Linear(2, 2)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model, opt = trained(fabric)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    fabric.load_raw(tmp_path / "weights.pt", model)
    assert torch.equal(model.weight, source.weight)
    _, other = trained(fabric, seed=2)
    fabric.load_raw(tmp_path / "opt.pt", other)
    assert other.state_dict()["state"][0]["step"] == 1
    with pytest.raises(MisconfigurationException, match="load_raw got Counter"):
        fabric.load_raw(tmp_path / "weights.pt", Counter())


def test_a_file_that_is_not_there_is_said_so(fabric, tmp_path):
    with pytest.raises(CheckpointNotFound):
        fabric.load(tmp_path / "none.ckpt")


def test_a_checkpoint_io_of_ones_own_is_used(tmp_path):
    class Memory:
        def __init__(self):
            self.store = {}

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.store[path] = checkpoint

        def load_checkpoint(self, path, map_location=None, weights_only=None):
            return dict(self.store[path])

        def remove_checkpoint(self, path):
            pass

        def teardown(self):
            pass

    fabric = Fabric(accelerator="cpu", devices=1, plugins=Memory())
    fabric.save("somewhere", {"a": 1})
    assert fabric.load("somewhere") == {"a": 1}
