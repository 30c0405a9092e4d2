"""``fulmen checkpoint``."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fulmen_checkpoint import TorchCheckpointIO
from fulmen_checkpoint.commands import main

if TYPE_CHECKING:
    import pytest


def _folder(tmp_path: Path) -> Path:
    io = TorchCheckpointIO()
    weights = {"layer.weight": torch.ones(3, 2), "layer.bias": torch.ones(3, dtype=torch.bfloat16)}
    io.save_checkpoint({"epoch": 3, "state_dict": weights, "xs": [1, 2], "text": "t" * 200}, tmp_path / "good.ckpt")
    (tmp_path / "bad.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:-9])
    torch.save({"p": Path("x")}, tmp_path / "objects.ckpt")
    return tmp_path


def test_it_is_registered_as_a_command() -> None:
    (found,) = entry_points(group="fulmen.commands.v1", name="checkpoint")
    assert found.load() is main


def test_verify_tells_whole_from_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path)
    assert main(["verify", str(folder / "good.ckpt"), str(folder / "objects.ckpt")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("good.ckpt: whole")
    assert out[1].endswith("objects.ckpt: whole (no digest: its records were checked)")
    assert main(["verify", str(folder / "bad.ckpt"), str(folder / "good.ckpt")]) == 1
    said = capsys.readouterr()
    assert "is damaged: the end is missing" in said.err
    assert "good.ckpt: whole" in said.out
    assert main(["verify", str(folder / "missing.ckpt")]) == 1


def test_list_names_each_and_its_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path)
    assert main(["list", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert sum(line.endswith("whole") for line in lines) == 2
    assert main(["list", str(folder), "--pattern", "good*"]) == 0
    assert main(["list", str(folder / "nowhere")]) == 1


def test_show_prints_shapes_and_refuses_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path)
    assert main(["show", str(folder / "good.ckpt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "epoch: 3",
        "state_dict: dict of 2",
        "  layer.weight: float32[3, 2]",
        "  layer.bias: bfloat16[3]",
        "xs: list of 2",
    ]
    assert len(lines[5]) < 100
    assert main(["show", "--depth", "1", str(folder / "good.ckpt")]) == 0
    assert "layer.weight" not in capsys.readouterr().out
    assert main(["show", str(folder / "objects.ckpt")]) == 1
    assert "pathlib" in capsys.readouterr().err


def test_a_wrong_command_gives_2() -> None:
    assert main([]) == 2
    assert main(["polish"]) == 2
    assert main(["--help"]) == 0
