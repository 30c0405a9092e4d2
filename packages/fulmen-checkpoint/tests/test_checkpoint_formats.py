"""Safetensors files, conversion between formats, folders of torch itself, and files of old Lightning versions."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fulmen_checkpoint import (
    SafetensorsCheckpointIO,
    ShardedCheckpointIO,
    TorchCheckpointIO,
    consolidate,
    convert,
    migrate,
    upgrade,
)
from fulmen_checkpoint.commands import main
from fulmen_protocols import CheckpointCorrupt, CheckpointError, CheckpointUnsafe, MisconfigurationException


def _checkpoint() -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "pair": (1, "a"),
    }


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


# ---- safetensors --------------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_our_files_and_we_read_its_files(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    checkpoint = _checkpoint()
    SafetensorsCheckpointIO().save_checkpoint({"state_dict": checkpoint["state_dict"]}, tmp_path / "ours.safetensors")
    assert _same(library.load_file(tmp_path / "ours.safetensors"), dict(checkpoint["state_dict"]))
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "e": torch.empty(0, 2)}
    library.save_file(tensors, tmp_path / "theirs.safetensors")
    assert _same(SafetensorsCheckpointIO().load_checkpoint(tmp_path / "theirs.safetensors"), {"state_dict": tensors})
    assert not TorchCheckpointIO().has_digest(tmp_path / "theirs.safetensors")
    TorchCheckpointIO().verify_checkpoint(tmp_path / "theirs.safetensors")


def test_dtypes_that_safetensors_has_no_word_for_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "c128": torch.tensor([1 + 2j, 3j], dtype=torch.complex128),
        "f8": torch.arange(4.0).to(torch.float8_e5m2fnuz),
        "scalar": torch.tensor(2j, dtype=torch.complex128),
        "conj": torch.tensor([1 + 2j]).conj(),
    }
    SafetensorsCheckpointIO().save_checkpoint({"t": tensors}, tmp_path / "a")
    found = SafetensorsCheckpointIO().load_checkpoint(tmp_path / "a")["t"]
    assert isinstance(found, dict)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].to(torch.complex128), tensor.to(torch.complex128)), name


def test_big_safetensors_files_are_mapped_with_private_changes(tmp_path: Path) -> None:
    io = SafetensorsCheckpointIO()
    io.save_checkpoint({"w": torch.ones(600_000)}, tmp_path / "a")
    loaded = io.load_checkpoint(tmp_path / "a")["w"]
    assert isinstance(loaded, torch.Tensor)
    loaded.zero_()
    assert torch.equal(io.load_checkpoint(tmp_path / "a")["w"], torch.ones(600_000))  # type: ignore[arg-type]
    read = SafetensorsCheckpointIO(mmap=False).load_checkpoint(tmp_path / "a")["w"]
    assert torch.equal(read, torch.ones(600_000))  # type: ignore[arg-type]


def test_every_single_byte_of_a_safetensors_file_is_covered_by_its_digest(tmp_path: Path) -> None:
    io, path = SafetensorsCheckpointIO(), tmp_path / "a"
    io.save_checkpoint({"w": torch.arange(5), "text": "x"}, path)
    whole = path.read_bytes()
    missed = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        try:
            io.load_checkpoint(path)
            missed.append(place)
        except CheckpointCorrupt:
            pass
    assert missed == []


def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path) -> None:
    def write(header: dict[str, Any], data: bytes) -> None:
        text = json.dumps(header).encode()
        (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + data)

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    lies: list[tuple[dict[str, Any], bytes]] = [
        ({"w": entry}, bytes(7)),
        ({"w": entry}, bytes(9)),
        ({"w": {**entry, "shape": [3]}}, bytes(8)),
        ({"w": {**entry, "shape": [-2]}}, bytes(8)),
        ({"w": {**entry, "dtype": "EVIL"}}, bytes(8)),
        ({"w": {**entry, "data_offsets": [4, 12]}}, bytes(12)),
        ({"w": entry, "v": entry}, bytes(8)),
        ({"__metadata__": {"fulmen.tree": "[" * 100_000}, "w": entry}, bytes(8)),
        ({"__metadata__": {"fulmen.tree": '{"a":{"$call":"os.system"}}'}, "w": entry}, bytes(8)),
        ({"__metadata__": {"fulmen.tree": '{"a":{"$tensor":"gone"}}'}, "w": entry}, bytes(8)),
    ]
    for header, data in lies:
        write(header, data)
        with pytest.raises(CheckpointCorrupt, match="damaged"):
            TorchCheckpointIO().load_checkpoint(tmp_path / "a")
    write({"w": entry}, bytes(8))
    assert _same(TorchCheckpointIO().load_checkpoint(tmp_path / "a"), {"state_dict": {"w": torch.zeros(2)}})


# ---- conversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["torch", "sharded", "safetensors"])
@pytest.mark.parametrize("target", ["torch", "sharded", "safetensors"])
def test_each_format_converts_to_each_other_without_loss(tmp_path: Path, source: Any, target: Any) -> None:
    TorchCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "source", source)
    convert(tmp_path / "source", tmp_path / "target", target)
    assert _same(TorchCheckpointIO().load_checkpoint(tmp_path / "target"), _checkpoint())
    if target == "torch":
        assert _same(torch.load(tmp_path / "target", weights_only=True), _checkpoint())


def test_converting_refuses_to_overwrite_and_keeps_only_the_weights_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TorchCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "a.ckpt")
    target = str(tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.ckpt"), target, "--weights-only"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert TorchCheckpointIO().load_checkpoint(target).keys() == {"state_dict"}
    assert main(["convert", str(tmp_path / "a.ckpt"), target]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "a.ckpt"), target, "--overwrite"]) == 0
    assert _same(TorchCheckpointIO().load_checkpoint(target), _checkpoint())
    TorchCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "b.ckpt")
    assert main(["convert", str(tmp_path / "b.ckpt"), str(tmp_path / "c"), "--weights-only"]) == 1
    assert "holds no 'state_dict' to keep: its keys are 'a'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "b.ckpt"), str(tmp_path / "c"), "--to", "zip"]) == 2
    with pytest.raises(
        MisconfigurationException, match=r"to='zip' is no format\. There are: torch, sharded, safetensors"
    ):
        convert(tmp_path / "b.ckpt", tmp_path / "c", "zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["verify", "list", "show", "convert", "consolidate", "upgrade"])
def test_each_verb_has_a_help_text(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"fulmen checkpoint {verb}" in text
    assert "No code from a checkpoint is run" in " ".join(text.split())


def test_the_commands_take_folders_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ShardedCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "a.ckpt")
    ShardedCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "b.ckpt")
    (tmp_path / "b.ckpt" / "manifest.json").unlink()
    assert main(["verify", str(tmp_path / "a.ckpt")]) == 0
    assert capsys.readouterr().out.strip().endswith("a.ckpt: whole")
    assert main(["list", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("a.ckpt  whole") for line in lines) == 1
    assert sum("manifest.json is missing" in line for line in lines) == 1
    assert main(["show", str(tmp_path / "a.ckpt")]) == 0
    assert "  0.weight: float32[7, 5]" in capsys.readouterr().out


# ---- folders of torch and of Lightning's FSDP ---------------------------------------------------------------------


def _lightning_folder(folder: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """What Lightning's FSDP strategy writes: tensors by torch, ``meta.pt`` beside them. Returns the module's state."""
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    names = ["weight", "bias"]
    by_name = {
        "state": {names[index]: entry for index, entry in state["state"].items()},
        "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save({"model": module.state_dict(), "optimizer_0": by_name}, checkpoint_id=folder)
    torch.save(extra, folder / "meta.pt")
    return {"state_dict": module.state_dict(), "optimizer_states": [state]}


@pytest.mark.proves("5.37")
def test_a_folder_of_lightnings_trainer_is_consolidated_into_a_file_that_its_optimizer_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"epoch": 2, "global_step": 5, "pytorch-lightning_version": "2.6.0"}
    expected = _lightning_folder(tmp_path / "run", extra)
    assert main(["consolidate", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/run.consolidated\n"
    found = torch.load(tmp_path / "run.consolidated", weights_only=True)
    assert {key: found[key] for key in extra} == extra
    assert _same(found["state_dict"], dict(expected["state_dict"]))
    assert _same(found["optimizer_states"][0]["state"], expected["optimizer_states"][0]["state"])
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=1.0)
    optimizer.load_state_dict(found["optimizer_states"][0])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert main(["consolidate", str(tmp_path / "run")]) == 1
    assert "run.consolidated' is there already" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path / "run"), "--output_file", str(tmp_path / "x.ckpt")]) == 0
    assert main(["consolidate", str(tmp_path / "x.ckpt"), "-o", str(tmp_path / "y")]) == 1
    assert "is no folder of shards" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path / "nowhere")]) == 1
    assert "there is no checkpoint at" in capsys.readouterr().err


@pytest.mark.proves("5.37")
def test_a_folder_of_fabric_keeps_its_own_names_and_ours_is_consolidated_too(tmp_path: Path) -> None:
    _lightning_folder(tmp_path / "fabric", {"step": 7})
    found = TorchCheckpointIO().load_checkpoint(consolidate(tmp_path / "fabric"))
    assert found.keys() == {"model", "optimizer_0", "step"}
    ShardedCheckpointIO().save_checkpoint(_checkpoint(), tmp_path / "ours")
    assert _same(torch.load(consolidate(tmp_path / "ours"), weights_only=True), _checkpoint())


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


def test_a_hostile_index_or_payload_in_a_folder_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.checkpoint as dcp

    monkeypatch.chdir(tmp_path)
    _lightning_folder(tmp_path / "run", {"epoch": 1})
    index = (tmp_path / "run" / ".metadata").read_bytes()
    for hostile in (pickle.dumps(_Evil()), pickle.dumps({"a": [_Evil()]})):
        (tmp_path / "run" / ".metadata").write_bytes(hostile)
        with pytest.raises(CheckpointUnsafe, match=r"names posix\.system, which no index of"):
            TorchCheckpointIO().load_checkpoint(tmp_path / "run")
    for junk in (b"", index[: len(index) // 2], b"\x80\x04junk", pickle.dumps(3)):
        (tmp_path / "run" / ".metadata").write_bytes(junk)
        with pytest.raises(CheckpointCorrupt, match=r"\.metadata"):
            TorchCheckpointIO().load_checkpoint(tmp_path / "run")
    (tmp_path / "run" / ".metadata").write_bytes(index)
    torch.save({"e": _Evil()}, tmp_path / "run" / "meta.pt")
    with pytest.raises(CheckpointUnsafe, match=r"posix\.system"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"w": torch.ones(1)}, "e": _Evil()}, checkpoint_id=tmp_path / "object")
    with pytest.raises(CheckpointUnsafe, match="only code from the file could rebuild"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "object")
    assert not (tmp_path / "pwned").exists()


def test_formats_without_any_checksum_load_with_a_warning_that_says_what_to_do(tmp_path: Path) -> None:
    _lightning_folder(tmp_path / "run", {"epoch": 1})
    torch.save({"w": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, kind in (
        ("run", r"a folder of torch\.distributed\.checkpoint"),
        ("old.pt", r"torch's format before 1\.6"),
    ):
        with pytest.warns(UserWarning, match=rf"{name}' is .*{kind}.*Write it anew with: fulmen checkpoint convert"):
            TorchCheckpointIO().load_checkpoint(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}.new")
        TorchCheckpointIO().load_checkpoint(tmp_path / f"{name}.new")


# ---- old Lightning ------------------------------------------------------------------------------------------------


@pytest.mark.proves("5.36")
def test_keys_of_0_10_become_the_state_of_callbacks() -> None:
    old: dict[str, Any] = {
        "state_dict": {}, "epoch": 4, "global_step": 40, "pytorch-lightning_version": "0.9.0",
        "checkpoint_callback_best_model_score": 0.5, "checkpoint_callback_best_model_path": "p.ckpt",
        "early_stop_callback_wait": 2, "early_stop_callback_patience": 3,
    }  # fmt: skip
    assert migrate(old) == ["0.10.0", "1.6.0", "1.6.5", "1.9.0", "2.0.0"]
    assert old["callbacks"] == {
        "ModelCheckpoint": {"best_model_score": 0.5, "best_model_path": "p.ckpt"},
        "EarlyStopping": {"wait_count": 2, "patience": 3},
    }
    assert not any(key.startswith(("checkpoint_callback", "early_stop")) for key in old)
    assert old["pytorch-lightning_version"] == "2.6.0"
    assert old["legacy_pytorch-lightning_version"] == "0.9.0"


@pytest.mark.proves("5.36")
def test_counters_of_before_1_6_are_found_in_the_loops() -> None:
    old: dict[str, Any] = {"state_dict": {}, "epoch": 4, "global_step": 40, "pytorch-lightning_version": "1.5.9"}
    migrate(old)
    fit = old["loops"]["fit_loop"]
    assert fit["epoch_progress"]["current"] == {"ready": 4, "started": 4, "processed": 4, "completed": 4}
    steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    assert steps["total"]["completed"] == 40
    assert fit["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"] == 40
    assert fit["epoch_loop.state_dict"]["_batches_that_stepped"] == 40


def _from_1_8() -> dict[str, Any]:
    counted = {"total": {"ready": 8, "completed": 8}, "current": {"ready": 8, "completed": 8}}
    return {
        "state_dict": {}, "epoch": 1, "global_step": 8, "pytorch-lightning_version": "1.8.0rc1",
        "amp_scaling_state": {"x": 1},
        "callbacks": {"ModelCheckpoint{'monitor': None, 'save_on_train_epoch_end': True}": {"a": 1}, "Other": {"b": 2}},
        "loops": {
            "fit_loop": {
                "epoch_loop.state_dict": {"_batches_that_stepped": 8},
                "epoch_loop.batch_loop.state_dict": {"mine": 1},
                "epoch_loop.batch_loop.optimizer_loop.state_dict": {},
                "epoch_loop.batch_loop.optimizer_loop.optim_progress": {
                    "optimizer": {"step": counted}, "optimizer_position": 1,
                },
                "epoch_loop.batch_loop.manual_loop.state_dict": {},
                "epoch_loop.batch_loop.manual_loop.optim_step_progress": counted,
            },
            "validate_loop": {
                "state_dict": {}, "dataloader_progress": {},
                "epoch_loop.state_dict": {"s": 1}, "epoch_loop.batch_progress": {"p": 1},
            },
        },
    }  # fmt: skip


@pytest.mark.proves("5.36")
def test_loops_keys_and_apex_of_before_2_0_are_brought_up_to_date() -> None:
    old = _from_1_8()
    with pytest.warns(UserWarning, match="NVIDIA apex"):
        assert migrate(old) == ["1.9.0", "2.0.0"]
    assert "amp_scaling_state" not in old
    assert old["callbacks"] == {"ModelCheckpoint{'monitor': None}": {"a": 1}, "Other": {"b": 2}}
    fit = old["loops"]["fit_loop"]
    assert not any("batch_loop" in key or "optimizer_loop" in key or "manual_loop" in key for key in fit)
    assert fit["epoch_loop.state_dict"]["old_batch_loop_state_dict"] == {"mine": 1}
    assert fit["epoch_loop.automatic_optimization.optim_progress"].keys() == {"optimizer"}
    assert "epoch_loop.manual_optimization.optim_step_progress" in fit
    assert old["loops"]["validate_loop"] == {"state_dict": {"s": 1}, "batch_progress": {"p": 1}}


@pytest.mark.proves("5.36")
def test_states_that_would_get_one_key_stay_as_they_are_with_a_warning() -> None:
    keys = [f"ModelCheckpoint{{'monitor': None, 'save_on_train_epoch_end': {value}}}" for value in (True, False)]
    old: dict[str, Any] = {"state_dict": {}, "callbacks": dict.fromkeys(keys, 1), "pytorch-lightning_version": "1.8.6"}
    with pytest.warns(UserWarning, match="two ModelCheckpoint states"):
        migrate(old)
    assert list(old["callbacks"]) == keys


@pytest.mark.proves("5.36")
def test_newer_files_are_left_alone_with_a_warning_and_those_of_today_without() -> None:
    for version, warned in (("3.1.0", True), ("2.7.0", True), ("2.6.6", False), ("2.0.0", False)):
        state = {"state_dict": {}, "amp_scaling_state": 1, "pytorch-lightning_version": version}
        before = copy.deepcopy(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert migrate(state, "x.ckpt") == []
        assert state == before
        assert [f"'x.ckpt' was written by Lightning {version}" in str(w.message) for w in caught] == [True] * warned


def test_what_lightning_did_not_write_is_never_migrated() -> None:
    for mine in ({"epoch": 1, "global_step": 2, "state_dict": {}}, {"pytorch-lightning_version": "1.0.0"}):
        before = copy.deepcopy(mine)
        assert migrate(mine) == []
        assert mine == before


def test_an_old_version_with_another_layout_is_one_clear_error() -> None:
    strange = {"state_dict": {}, "epoch": 1, "global_step": 2, "loops": [], "pytorch-lightning_version": "1.5.0"}
    with pytest.raises(CheckpointError, match=r"says that Lightning 1\.5\.0 wrote it, but its layout is another one"):
        migrate(strange)


_WRITE_OLD = """
import argparse, enum, sys, types, torch

def module(name):
    made = sys.modules[name] = types.ModuleType(name)
    return made

for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint",
             "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing", "pytorch_lightning.utilities.enums"):
    module(name)

class AttributeDict(dict):
    __module__ = "pytorch_lightning.utilities.parsing"
class ModelCheckpoint:
    __module__ = "pytorch_lightning.callbacks.model_checkpoint"
class Mode(str, enum.Enum):
    __module__ = "pytorch_lightning.utilities.enums"
    AUTO = "automatic"
for cls in (AttributeDict, ModelCheckpoint, Mode):
    setattr(sys.modules[cls.__module__], cls.__name__, cls)
callback = ModelCheckpoint()
callback.best = torch.ones(2)
torch.save({"state_dict": {"w": torch.arange(3.0)}, "epoch": 1, "global_step": 2, "pytorch-lightning_version": "1.4.0",
            "callbacks": {ModelCheckpoint: {"best_model_path": "b.ckpt", "itself": callback}},
            "hyper_parameters": AttributeDict(lr=0.1, mode=Mode.AUTO, nested=[AttributeDict(a=1)]),
            "hparams": argparse.Namespace(depth=2)}, sys.argv[1], _use_new_zipfile_serialization=sys.argv[2] == "zip")
"""


@pytest.mark.proves("5.36")
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_classes_of_pytorch_lightning_in_a_file_are_read_as_plain_data(tmp_path: Path, kind: str) -> None:
    subprocess.run([sys.executable, "-c", _WRITE_OLD, str(tmp_path / "old.ckpt"), kind], check=True, timeout=60)
    assert "pytorch_lightning" not in sys.modules
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before 1.6, which carries no checksum")
        found = TorchCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")
    assert "pytorch_lightning" not in sys.modules, "nothing was imported"
    state = found["callbacks"]
    assert isinstance(state, dict)
    assert state.keys() == {"ModelCheckpoint"}
    assert state["ModelCheckpoint"]["best_model_path"] == "b.ckpt"
    assert _same(state["ModelCheckpoint"]["itself"], {"best": torch.ones(2)})
    assert found["hyper_parameters"] == {"lr": 0.1, "mode": "automatic", "nested": [{"a": 1}]}
    assert type(found["hyper_parameters"]) is dict
    assert found["hparams"] == {"depth": 2}
    assert found["legacy_pytorch-lightning_version"] == "1.4.0"
    TorchCheckpointIO().save_checkpoint(found, tmp_path / "new.ckpt")


def test_names_beside_lightnings_are_refused_even_together_with_them(tmp_path: Path) -> None:
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        sys.modules[name] = types.ModuleType(name)
    cls = type("Early", (), {"__module__": "pytorch_lightning.callbacks"})
    sys.modules["pytorch_lightning.callbacks"].Early = cls  # type: ignore[attr-defined]
    try:
        torch.save({"a": cls, "b": argparse.Namespace(x=1), "c": Path("x")}, tmp_path / "a.ckpt")
    finally:
        del sys.modules["pytorch_lightning"], sys.modules["pytorch_lightning.callbacks"]
    with pytest.raises(CheckpointUnsafe, match=r"pathlib\.\w*Path"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


@pytest.fixture
def old_files(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    old = {"state_dict": {"w": torch.ones(2)}, "epoch": 1, "global_step": 2, "pytorch-lightning_version": "1.5.0"}
    for name in ("a.ckpt", "deep/b.ckpt", "c.pt"):
        torch.save(old, tmp_path / name)
    torch.save({**old, "pytorch-lightning_version": "2.6.0"}, tmp_path / "today.ckpt")
    return tmp_path


@pytest.mark.proves("5.36")
def test_upgrade_rewrites_old_files_and_keeps_the_originals(
    old_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in old_files.rglob("*.*")}
    assert main(["upgrade", str(old_files)]) == 0
    said = capsys.readouterr().out
    assert said.count("changes of 1.6.0, 1.6.5, 1.9.0, 2.0.0") == 2
    assert "today.ckpt: is of today" in said
    for name in ("a", "deep/b"):
        assert (old_files / f"{name}.bak").read_bytes() == before[old_files / f"{name}.ckpt"]
        new = torch.load(old_files / f"{name}.ckpt", weights_only=True)
        assert new["pytorch-lightning_version"] == "2.6.0"
        assert "fit_loop" in new["loops"]
    assert (old_files / "c.pt").read_bytes() == before[old_files / "c.pt"]
    assert (old_files / "today.ckpt").read_bytes() == before[old_files / "today.ckpt"]
    assert [applied for _, applied in upgrade(old_files)] == [[], [], []]
    assert main(["upgrade", str(old_files), "-e", "pt"]) == 0
    assert (old_files / "c.bak").exists()
    assert main(["upgrade", str(old_files / "deep"), "-e", ".zip"]) == 1
    assert main(["upgrade", str(old_files / "nowhere")]) == 1
    assert "Check the path" in capsys.readouterr().err
