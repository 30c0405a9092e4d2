"""Training on two gloo processes through the Trainer equals a DDP loop by hand, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("ddp_script.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], folder: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.proves("4.14", "6.18", "9.34")
@pytest.mark.parametrize(("optimizer", "accumulate"), [pytest.param("sgd", 1, marks=pytest.mark.slow), ("adam", 4)])
def test_ddp_through_the_trainer_equals_a_raw_ddp_loop_bit_for_bit(
    optimizer: str, accumulate: int, tmp_path: Path
) -> None:
    for name in ("raw", "ours"):
        (tmp_path / name).mkdir()
    arguments = [optimizer, str(accumulate)]

    by_hand = run([*TORCHRUN, str(SCRIPT), "raw", str(tmp_path / "raw"), *arguments], tmp_path / "raw")
    ours = run([sys.executable, str(SCRIPT), "fulmen", str(tmp_path / "ours"), *arguments], tmp_path / "ours")

    assert by_hand[0]["digest"] == by_hand[1]["digest"], "the two ranks of the raw loop must agree"
    assert [rank["digest"] for rank in ours] == [rank["digest"] for rank in by_hand]

    # What else a run on two ranks must get right, checked here to start no more processes than needed.
    assert ours[0]["metrics"] == ours[1]["metrics"], "synced metrics are equal on every rank"
    assert "only_rank_1" in ours[0]["metrics"], "ranks may log different keys"
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(13, 8, generator=generator).sum(1).mean().item()
    for rank in ours:
        assert rank["validated"][0]["val_mean"] == pytest.approx(exact, rel=1e-5), "each sample counts exactly once"
    assert ours[0]["seen"] + ours[1]["seen"] == 13
    assert ours[0]["checkpoints"] == ours[1]["checkpoints"] != []
    assert ours[0]["steps"] == 2 * -(-6 // accumulate)


@pytest.mark.proves("4.40")
def test_the_same_script_runs_under_torchrun(tmp_path: Path) -> None:
    ours = run([*TORCHRUN, str(SCRIPT), "fulmen", str(tmp_path), "sgd", "1"], tmp_path)

    assert ours[0]["digest"] == ours[1]["digest"]


@pytest.mark.proves("4.34")
def test_a_rank_that_raises_ends_the_run_with_its_own_traceback_last(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import torch, fulmen\n"
        "from torch.utils.data import DataLoader\n"
        "class Model(fulmen.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(2, 1)\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if self.global_rank == 1 and batch_idx == 2:\n"
        "            raise KeyError('the culprit')\n"
        "        return self.layer(batch).sum()\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), lr=0.1)\n"
        "if __name__ == '__main__':\n"
        "    fulmen.Trainer(accelerator='cpu', devices=2, max_epochs=3, barebones=True).fit(\n"
        "        Model(), DataLoader(torch.randn(40, 2), batch_size=2))\n"
    )

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode != 0
    last = done.stderr[-3000:]
    assert "KeyError: 'the culprit'" in last
    assert "rank 1" in last
    assert "batch 2" in last, "where it happened is noted"
    assert last.rstrip().splitlines()[-1].startswith(("fulmen: in fit", "[rank1]")), last
