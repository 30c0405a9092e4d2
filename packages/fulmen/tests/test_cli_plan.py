"""``fulmen plan``: what a user types, what is printed, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from fulmen.cli.plan import plan
from fulmen.memory_plan.report import in_units, parse_size
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path

NET = """
import torch, fulmen
from torch import nn

class Layer(nn.Linear):
    pass

class Net(fulmen.LightningModule):
    def __init__(self, width: int = 8, layers: int = 1):
        super().__init__()
        self.net = nn.Sequential(*(Layer(width, width, bias=False) for _ in range(layers)))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=int(total))]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(8, 8), batch_size=4)

def build():
    return Net(width=8, layers=3)
"""

CONFIG = """
model: {class_path: planned_net.Net, init_args: {width: 8, layers: 2}}
trainer: {strategy: ddp, devices: auto, accelerator: gpu, precision: bf16-true, logger: true, max_epochs: 3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "planned_net.py").write_text(NET, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("planned_net", None)
    return tmp_path


def numbers(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert plan([*words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_class_or_a_function_of_a_file_or_module_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_class = numbers(capsys, "planned_net.py:Net", "--init", "width=16", "layers=2", "--batch", "float32[4,16]")
    assert of_class["parameters"] == of_class["gradients"] == 4 * 2 * 16 * 16
    of_function = numbers(capsys, "planned_net:build")
    assert of_function["parameters"] == 4 * 3 * 8 * 8
    assert of_function["batch"] == "float32[4, 8]"  # from its training loader


def test_ranks_strategy_and_precision_are_those_of_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--devices", "8", "--num-nodes", "8", "--strategy", "ddp", "--precision", "bf16-true", "--batch-size", "2"]
    made = numbers(capsys, "planned_net.py:Net", *words)
    assert (made["world_size"], made["strategy"], made["precision"]) == (64, "ddp", "bf16-true")
    assert made["parameters"] == 2 * 8 * 8
    assert made["batch"] == "float32[2, 8]"
    sized = numbers(capsys, "planned_net.py:Net", *words, "--strategy-option", "gradient_as_bucket_view=True")
    assert made["communication"] > 0 == sized["communication"]


def test_a_configuration_of_a_fit_is_planned_without_its_devices(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = numbers(capsys, "--config", "config.yaml", "--devices", "4")
    assert (made["world_size"], made["strategy"], made["precision"]) == (4, "ddp", "bf16-true")
    assert made["parameters"] == 2 * 2 * 8 * 8
    assert numbers(capsys, "-c", "config.yaml", "--devices", "2", "--precision", "32-true")["parameters"] == 4 * 2 * 64
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) in ([], ["__pycache__"])  # nothing written


def test_what_does_not_fit_is_said_with_what_would_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["planned_net.py:Net", "--init", "width=512", "layers=8", "--batch", "float32[4,512]"]
    assert plan([*words, "--memory", "80GiB"]) == 0
    assert "fits: the peak of" in capsys.readouterr().out
    assert plan([*words, "--memory", "10MiB", "--devices", "4", "--strategy", "ddp"]) == 3
    said = capsys.readouterr().out
    assert "does NOT fit: the peak of" in said
    assert "above 10 MiB" in said
    assert "strategy='fsdp' instead of 'ddp', over the same 4 ranks (saves about" in said
    assert numbers(capsys, *words, "--memory", "1MB", code=3)["verdict"][0].startswith("does NOT fit")


def test_layers_that_fsdp_shards_as_units_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["planned_net.py:Net", "--init", "width=512", "layers=8", "--batch", "float32[4,512]", "--strategy", "fsdp"]
    whole = numbers(capsys, *words, "--devices", "4", "--memory", "1MB", code=3)
    units = numbers(capsys, *words, "--devices", "4", "--wrap", "Layer")
    assert whole["parameters"] == units["parameters"] == 4 * 8 * 512 * 512 // 4
    assert whole["communication"] > 4 * 8 * 512 * 512 > units["communication"]
    assert any("auto_wrap_policy={Block} of the strategy" in line for line in whole["verdict"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "model=None and --config=[]: give one of the two"),
        (["planned_net.py:Net", "--config", "config.yaml"], "give one of the two"),
        (["planned_net"], "model='planned_net': write it as FILE.py:NAME"),
        (["missing.py:Net"], "model='missing.py:Net': there is no file 'missing.py'"),
        (["missing_module:Net"], "there is no module 'missing_module'"),
        (["planned_net.py:Nett"], "no class and no function. Did you mean 'Net'?"),
        (["planned_net.py:Net", "--init", "width"], "--init got 'width'. Write it as NAME=VALUE"),
        (["planned_net.py:Net", "--memory", "lots"], "--memory='lots' is no amount of memory"),
        (
            ["planned_net.py:Net", "--strategy-option", "a=1"],
            "--strategy-option=['a=1'] and --wrap=[]: give --strategy too",
        ),
        (["planned_net.py:Net", "--batch", "float32"], "batch='float32' cannot be read"),
        (["--config", "config.yaml"], "trainer.devices='auto', from which no number of devices follows"),
        (["planned_net.py:Net", "--strategy", "ddpp"], "ddpp"),
    ],
)
def test_bad_input_names_the_flag_the_value_and_the_fix(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert plan(words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""


def test_sizes_are_read_and_written_with_their_units() -> None:
    assert parse_size("80GiB") == 80 * 2**30
    assert parse_size("40 gb") == 40 * 10**9
    assert parse_size("512") == 512
    for wrong in ("", "0GiB", "-1GiB", "80 apples"):
        with pytest.raises(MisconfigurationException, match=f"--memory='{wrong}' is no amount"):
            parse_size(wrong)
    assert [in_units(size) for size in (12, 1536, 2**30, 1023 * 2**30)] == ["12 B", "1.5 KiB", "1 GiB", "1023 GiB"]
