"""Objects of a user's class in a checkpoint: saved as plain data under a registered name, loaded as objects again."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen_checkpoint import (
    AsyncCheckpointIO,
    PackedObject,
    SafetensorsCheckpointIO,
    ShardedCheckpointIO,
    TorchCheckpointIO,
    convert,
    register_serializer,
    serializers,
)
from fulmen_protocols import CheckpointError, CheckpointUnsafe, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fulmen_protocols import CheckpointIO


@dataclass
class Vocabulary:
    words: list[str]
    weights: torch.Tensor


@dataclass
class Config:
    rate: float
    vocabulary: Vocabulary | None = None


class Derived(Config):
    pass


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serializers, "_by_name", {})
    monkeypatch.setattr(serializers, "_by_kind", {})
    register_serializer("test.Vocabulary", Vocabulary, lambda v: dict(vars(v)), lambda plain: Vocabulary(**plain))
    register_serializer("test.Config", Config, lambda c: [c.rate, c.vocabulary], lambda plain: Config(*plain))


IOS: dict[str, Callable[[], CheckpointIO]] = {
    "torch": TorchCheckpointIO,
    "safetensors": SafetensorsCheckpointIO,
    "sharded": ShardedCheckpointIO,
    "asynchronous": AsyncCheckpointIO,
}


def checkpoint() -> dict[str, Any]:
    vocabulary = Vocabulary(["a", "b"], torch.arange(3.0))
    state = OrderedDict(w=torch.ones(2))
    state._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    return {
        "state_dict": state,
        "callbacks": {"Mine": {"vocabulary": vocabulary, "same": vocabulary, "pair": (1, Config(0.1, vocabulary))}},
        "order": list(range(100)),
        "step": 3,
    }


def assert_same(found: dict[str, Any], kind: str) -> None:
    assert set(found) == {"state_dict", "callbacks", "order", "step"}
    mine = found["callbacks"]["Mine"]
    assert type(mine["vocabulary"]) is Vocabulary
    assert mine["vocabulary"].words == ["a", "b"]
    assert torch.equal(mine["vocabulary"].weights, torch.arange(3.0))
    assert (mine["pair"][0], mine["pair"][1].rate) == (1, 0.1)
    assert mine["pair"][1].vocabulary.words == ["a", "b"]
    if kind in ("torch", "asynchronous"):  # the other formats are trees
        assert mine["same"] is mine["vocabulary"] is mine["pair"][1].vocabulary
    assert torch.equal(found["state_dict"]["w"], torch.ones(2))


@pytest.mark.parametrize("kind", list(IOS))
def test_registered_objects_come_back_in_every_format_and_the_checkpoint_is_left_as_it_was(
    kind: str, tmp_path: Path
) -> None:
    io, content = IOS[kind](), checkpoint()
    mine = content["callbacks"]["Mine"]["vocabulary"]
    io.save_checkpoint(content, tmp_path / "a.ckpt")
    assert_same(io.load_checkpoint(tmp_path / "a.ckpt"), kind)
    assert set(content) == {"state_dict", "callbacks", "order", "step"}
    assert content["callbacks"]["Mine"]["vocabulary"] is mine
    io.teardown()
    if kind == "sharded":
        into = {"state_dict": {"w": torch.zeros(2)}}
        found = ShardedCheckpointIO().load_sharded(tmp_path / "a.ckpt", into)
        assert_same(found, kind)
        assert torch.equal(into["state_dict"]["w"], torch.ones(2))


def test_plain_torch_reads_the_name_and_the_data_without_any_code(tmp_path: Path) -> None:
    TorchCheckpointIO().save_checkpoint({"config": Config(0.5)}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == {
        "config": {"fulmen.serializer": "test.Config", "value": [0.5, None]},
        "fulmen_serializers": ["test.Config"],
    }


def test_a_checkpoint_without_registered_objects_is_written_as_ever(tmp_path: Path) -> None:
    content = {"a": [1], "b": {"fulmen.serializer": "test.Config", "value": [1, None]}}
    TorchCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == content
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == content, "data that looks like it is left alone"


_ELSEWHERE = """
import sys, warnings
from fulmen_checkpoint import PackedObject, TorchCheckpointIO, convert
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = TorchCheckpointIO().load_checkpoint(sys.argv[1])
    convert(sys.argv[1], sys.argv[2])
assert type(found["config"]) is PackedObject, found
assert found["config"].value == [0.5, None]
print(caught[0].message)
"""


def test_an_object_of_an_unknown_name_is_named_stays_packed_and_survives_a_conversion(tmp_path: Path) -> None:
    TorchCheckpointIO().save_checkpoint({"config": Config(0.5), "w": torch.ones(2)}, tmp_path / "a.ckpt")
    there = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "a.ckpt"), str(tmp_path / "b.safetensors")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert "'test.Config', whose serializers are not registered here" in there.stdout
    assert "fulmen_checkpoint.register_serializer, before loading" in there.stdout
    convert(tmp_path / "b.safetensors", tmp_path / "c.ckpt")
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "c.ckpt")["config"] == Config(0.5)


def test_the_file_cannot_choose_what_makes_the_object(tmp_path: Path) -> None:
    hostile = {"x": {"fulmen.serializer": "os.system", "value": "touch pwned"}, "fulmen_serializers": ["os.system"]}
    torch.save(hostile, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="'os.system', whose serializers are not registered"):
        found = TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(found["x"], PackedObject)


def test_only_the_very_class_is_registered_and_the_refusal_says_how_to_register(tmp_path: Path) -> None:
    for io in (TorchCheckpointIO(), SafetensorsCheckpointIO()):
        with pytest.raises(CheckpointUnsafe, match=r"Derived.*fulmen_checkpoint\.register_serializer"):
            io.save_checkpoint({"c": Derived(0.5)}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_what_a_serializer_gives_must_be_plain_and_is_named_with_its_place(tmp_path: Path) -> None:
    register_serializer("test.Derived", Derived, lambda value: {"code": print}, lambda plain: Derived(0.0))
    with pytest.raises(CheckpointUnsafe, match=r"c\.value\.code: builtin_function_or_method"):
        TorchCheckpointIO().save_checkpoint({"c": Derived(0.5)}, tmp_path / "a.ckpt")


def test_errors_of_a_serializer_name_it_and_the_place(tmp_path: Path) -> None:
    def fail(value: object) -> Any:
        raise ValueError("no")

    register_serializer("test.Derived", Derived, fail, fail)
    with pytest.raises(CheckpointError, match=r"to_plain of the serializer 'test.Derived' failed for \['c'\]\[1\]: Va"):
        TorchCheckpointIO().save_checkpoint({"c": [0, Derived(0.5)]}, tmp_path / "a.ckpt")
    register_serializer("test.Derived", Derived, lambda value: 1, fail)
    TorchCheckpointIO().save_checkpoint({"c": [0, Derived(0.5)]}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"from_plain .*'test.Derived' failed for \['c'\]\[1\] of '.*a.ckpt': V"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("test.Config", Derived, r"name='test.Config' for .*Derived, but 'test.Config' is registered for .*Config\."),
        ("other", Config, r"name='other' for .*Config, but 'test.Config' is registered for .*choose another name"),
        ("", Derived, r"name=''\. Give one that will not change, such as '.*Derived'"),
    ],
)
def test_a_name_or_a_class_is_registered_once(name: str, kind: type, said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        register_serializer(name, kind, vars, kind)
    register_serializer("test.Config", Config, lambda c: [c.rate], lambda plain: Config(*plain))  # a reloaded module


def test_a_container_that_holds_itself_is_walked_once(tmp_path: Path) -> None:
    loop: list[Any] = [Config(0.5), None]
    loop[1] = {"tail": loop[0]}
    itself: list[Any] = []
    itself.append(itself)
    TorchCheckpointIO().save_checkpoint({"loop": loop, "itself": itself}, tmp_path / "a.ckpt")
    found = TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert found["loop"][0] is found["loop"][1]["tail"]  # type: ignore[index]
    assert found["itself"][0] is found["itself"]  # type: ignore[index]
