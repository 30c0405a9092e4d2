"""``fulmen export`` from a checkpoint of plain modules; of LightningModules: integration_tests."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from fulmen_protocols.cli import main

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x, ids):
        return self.layers(x + self.table(ids))


class Example(nn.Linear):
    example_input_array = torch.zeros(2, 4)

    def __init__(self):
        super().__init__(4, 2)


class ByName(Example):
    example_input_array = {"input": torch.zeros(2, 4)}


number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a module ``exported_nets`` that is importable from nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "exported_nets", raising=False)
    (tmp_path / "exported_nets.py").write_text(SOURCE)
    return tmp_path


def a_checkpoint(folder: Path, name: str = "Net", **arguments: int) -> torch.nn.Module:
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec(compile(SOURCE, "exported_nets", "exec"), namespace)
    torch.manual_seed(0)
    net = namespace[name](**arguments)
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, folder / "last.ckpt")
    return net.eval()


def test_the_weights_of_a_checkpoint_become_an_artifact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = a_checkpoint(folder, width=5)
    command = "export last.ckpt --module exported_nets:Net --init width=5 --format torch_export --dynamic-batch"

    status = main([*command.split(), "--input-shape", "1,4", "1:int64", "--output", "out/net.pt2"])

    said = capsys.readouterr()
    assert status == 0, said.err
    assert "out/net.pt2: exported_nets:Net of last.ckpt as torch_export, equal to the model" in said.out
    x, ids = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    got = torch.export.load(folder / "out" / "net.pt2").module()(x, ids)
    torch.testing.assert_close(got, net(x, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Example", "ByName"])
def test_without_shapes_the_models_example_is_used(folder: Path, name: str) -> None:
    net = a_checkpoint(folder, name)

    assert main(f"export last.ckpt --module exported_nets:{name} --format torch_export --output net.pt2".split()) == 0

    x = torch.randn(2, 4)
    run = torch.export.load(folder / "net.pt2").module()
    assert torch.equal(run(x) if name == "Example" else run(input=x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_options_reach_the_exporter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = a_checkpoint(folder, "Example")
    command = "export last.ckpt --module exported_nets:Example --format torchscript --output net.pt --no-verify"

    assert main([*command.split(), "--option", "method=trace", "check_trace=False"]) == 0

    assert "not compared with the model" in capsys.readouterr().out
    x = torch.randn(2, 4)
    assert torch.equal(torch.jit.load("net.pt")(x), net(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--format": "onxn"}, ["no exporter is named 'onxn'", "Did you mean 'onnx'?"]),
        ({"--module": "exported_nets"}, ["--module is 'exported_nets'", "package.module:Class"]),
        ({"--module": "exported_nest:Net"}, ["'exported_nest' cannot be imported", "Start the command in the folder"]),
        ({"--module": "exported_nets:Nett"}, ["'Nett' in 'exported_nets' is None", "Did you mean 'Net'?"]),
        ({"--module": "exported_nets:number"}, ["is 3, not a class of modules"]),
        ({"--input-shape": "2,x"}, ["--input-shape got '2,x'", "1,3,32,32"]),
        ({"--input-shape": "2,0"}, ["--input-shape got '2,0'"]),
        ({"--input-shape": "2,4:int63"}, ["--input-shape got '2,4:int63'", "torch's dtypes"]),
        ({"--input-shape": None}, ["no --input-shape was given", "no example_input_array"]),
        ({"--init": "width"}, ["--init got 'width'", "NAME=VALUE"]),
        ({"--init": "widht=3"}, ["Net cannot be built from 'last.ckpt'", "--init NAME=VALUE"]),
        ({"--init": "width=9"}, ["Net cannot be built from 'last.ckpt'", "size mismatch"]),
        ({"--option": "strickt=True"}, ["strickt=True", "Did you mean 'strict'?"]),
        ({"--output": "exported_nets.py/net.pt2"}, ["exported_nets.py/net.pt2", "is not a folder"]),
        ({"checkpoint": "lost.ckpt"}, ["lost.ckpt"]),
    ],
)
def test_a_wrong_command_is_one_line_and_writes_nothing(
    change: dict[str, str | None], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_checkpoint(folder)
    before = sorted(folder.rglob("*"))
    flags: dict[str, str | None] = {
        "--module": "exported_nets:Net",
        "--format": "torch_export",
        "--output": "net.pt2",
        "--input-shape": "2,4 2:int64",
        **change,
    }
    checkpoint = flags.pop("checkpoint", "last.ckpt")
    words_of = [word for flag, value in flags.items() if value for word in (flag, *value.split())]

    status = main(["export", str(checkpoint), *words_of])

    said = capsys.readouterr()
    assert status == 1
    assert said.out == ""
    for word in words:
        assert word in said.err, said.err
    assert "Traceback" not in said.err
    assert [entry for entry in sorted(folder.rglob("*")) if "__pycache__" not in str(entry)] == before


def test_a_missing_flag_is_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "last.ckpt"]) == 2
    assert "--module" in capsys.readouterr().err
