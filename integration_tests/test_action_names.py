"""Profiled actions have Lightning's names, and are called as often: compared with Lightning's own SimpleProfiler."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from integration_tests.hook_recorder import SCENARIOS

RECORDER = Path(__file__).with_name("action_recorder.py")

# Lightning's strategies have hooks of their own for the events of a run; ours have none that could be measured.
ONLY_THEIRS = re.compile(r"\[Strategy\]\w+\.on_")
ONLY_OURS = {"setup_train_dataloader"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


@cache
def actions(library: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, str(RECORDER), library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ACTIONS"))
    found: dict[str, dict[str, int]] = json.loads(line.removeprefix("ACTIONS"))
    return found


@pytest.mark.proves("13.6")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_actions_are_named_and_counted_as_by_lightning(scenario: str) -> None:
    ours, theirs = actions("fulmen")[scenario], actions("lightning.pytorch")[scenario]

    ours = {name: count for name, count in ours.items() if name not in ONLY_OURS}
    theirs = {name: count for name, count in theirs.items() if not ONLY_THEIRS.match(name)}
    assert ours == theirs


@pytest.mark.proves("13.6")
def test_the_names_of_the_documentation_are_among_them() -> None:
    names = (
        set(actions("fulmen")["plain"]) | set(actions("fulmen")["manual"]) | set(actions("fulmen")["save_and_resume"])
    )

    assert {
        "[Strategy]SingleDeviceStrategy.training_step",
        "[LightningModule]Module.on_train_batch_start",
        "[Callback]Callback.on_train_batch_start",
        "[_TrainingEpochLoop].train_dataloader_next",
        "run_training_epoch",
        "run_training_batch",
        "optimizer_step",
        "save_checkpoint",
        "setup_train_dataloader",
    } <= names


SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader
import fulmen
from fulmen.profilers import SimpleProfiler


class Model(fulmen.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = fulmen.Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        profiler=SimpleProfiler(dirpath=sys.argv[1], filename="times"),
    )
    run.fit(Model(), DataLoader(torch.randn(12, 2), batch_size=2))
"""


@pytest.mark.proves("13.6")
@pytest.mark.slow
def test_every_rank_writes_its_own_report_of_what_its_strategy_did(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    reports = tmp_path / "reports"
    command = [sys.executable, str(script), str(reports)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    assert sorted(path.name for path in reports.iterdir()) == ["fit-times-0.txt", "fit-times-1.txt"]
    for path in reports.iterdir():
        row = next(line for line in path.read_text().splitlines() if "[Strategy]DDPStrategy.training_step" in line)
        assert row.split("|")[3].strip() == "3", "half of the six batches"
