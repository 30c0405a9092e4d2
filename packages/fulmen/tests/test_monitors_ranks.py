"""What watches a run, on two gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.processes

SCRIPT = """
import contextlib, io, json, os, sys, time, warnings
import torch
from torch.utils.data import DataLoader
from fulmen import LightningModule, Trainer
from fulmen.callbacks import (
    DeviceStatsMonitor, LearningRateMonitor, RichProgressBar, SpikeDetection, ThroughputMonitor, Timer, TQDMProgressBar
)
from fulmen.callbacks.spike import TrainingSpikeException
from fulmen.utilities.model_summary import summarize

warnings.simplefilter("ignore")
torch.set_num_threads(1)
FOLDER = sys.argv[1]


class Rows:
    name, version = "rows", 0
    def __init__(self): self.rows = []
    def log_metrics(self, metrics, step=None): self.rows.append((step, dict(metrics)))
    def log_hyperparams(self, params): ...
    def save(self): ...
    def finalize(self, status): ...


class Model(LightningModule):
    flops_per_batch = 500
    def __init__(self, pause_s=0.0, spike=False):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.pause_s, self.spike = pause_s, spike
    def training_step(self, batch, batch_idx):
        time.sleep(self.pause_s)
        bad = self.spike and self.global_rank == 1 and batch_idx == 3
        return self.layer(batch).mean() * 0 + (9.0 if bad else 1.0)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(callbacks, model, **flags):
    given = dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False)
    trainer = Trainer(accelerator="cpu", devices=2, callbacks=callbacks, **{**given, "max_epochs": 1, **flags})
    trainer.fit(model, DataLoader(torch.ones(80, 2), batch_size=2))
    return trainer


def main():
    result = {}
    rows = Rows()
    monitors = [ThroughputMonitor(len, window_size=3), DeviceStatsMonitor(), LearningRateMonitor("epoch")]
    trainer = run(monitors, Model(), logger=rows, log_every_n_steps=4, max_steps=8)
    rank = trainer.global_rank
    result["rows"] = rows.rows

    # Rank 0's clock decides, whatever the other one's says.
    for name, durations in (("early", (0.2, 86400.0)), ("late", (86400.0, 0.001))):
        timer = Timer({"seconds": durations[rank]}, verbose=False)
        result[name] = run([timer], Model(pause_s=0.01), max_epochs=-1, max_steps=60).global_step
    timer = Timer({"seconds": (0.001, 86400.0)[rank]}, interval="epoch", verbose=False)
    result["epoch"] = run([timer], Model(), max_epochs=5).current_epoch

    detection = SpikeDetection(exclude_batches_path=FOLDER)
    try:
        run([detection], Model(spike=True))
    except TrainingSpikeException as error:
        result["spike"] = error.batch_idx
    result["bad_batches"] = detection.bad_batches

    for kind in (TQDMProgressBar, RichProgressBar):
        bar, out = kind(), io.StringIO()
        with contextlib.redirect_stdout(out):
            run([bar], Model(), enable_progress_bar=True)
        result[kind.__name__] = [bar.is_enabled, out.getvalue()]

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    expected = summarize(net)
    mesh = init_device_mesh("cpu", (2,))
    for each in (*net, net):
        fully_shard(each, mesh=mesh)
    sharded = summarize(net)
    local = sum(parameter.to_local().numel() for parameter in net.parameters())
    result["summary"] = [
        [summary.total_parameters, summary.trainable_parameters, summary.model_size, summary.param_nums]
        for summary in (expected, sharded)
    ]
    result["local"] = local
    with open(f"{FOLDER}/rank{rank}.json", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, folder],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=environment,
        cwd=folder,  # where the run's own log goes, as the logger has no folder
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.mark.slow
@pytest.mark.proves("11.18", "13.7")
def test_rank_zero_logs_its_own_rates_and_those_of_both(ranks: Any) -> None:
    (zero, one), _ = ranks
    rows = [row for _, row in zero["rows"] if "train/time" in row]
    assert [row["train/batches"] for row in rows] == [4, 8]
    for name in ("batches", "samples", "flops"):
        assert rows[-1][f"train/{name}_per_sec"] == pytest.approx(2 * rows[-1][f"train/device/{name}_per_sec"])
    assert one["rows"] == []


@pytest.mark.proves("11.9", "11.8")
def test_rank_zero_logs_its_devices_statistics_and_the_rates(ranks: Any) -> None:
    (zero, _), _ = ranks
    names = {name for _, row in zero["rows"] for name in row}
    assert "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in names
    assert "lr-SGD" in names


@pytest.mark.proves("11.10")
def test_rank_zeros_timer_decides_for_both(ranks: Any) -> None:
    (zero, one), _ = ranks
    assert zero["early"] == one["early"] < 40
    assert zero["late"] == one["late"] == 60
    assert zero["epoch"] == one["epoch"] == 1


@pytest.mark.proves("11.17")
def test_a_spike_on_one_rank_ends_both(ranks: Any) -> None:
    (zero, one), folder = ranks
    assert zero["spike"] == one["spike"] == 3
    assert zero["bad_batches"] == one["bad_batches"] == [2, 3]
    assert json.loads((folder / "skip_batches.json").read_text()) == [2, 3]


@pytest.mark.proves("11.20")
@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
def test_the_bar_draws_on_rank_zero_alone(ranks: Any, kind: str) -> None:
    (zero, one), _ = ranks
    assert zero[kind][0]
    assert "20/20" in zero[kind][1]
    assert one[kind] == [False, ""]


@pytest.mark.proves("13.9")
def test_sharded_parameters_count_as_the_whole_on_every_rank(ranks: Any) -> None:
    for rank in ranks[0]:
        whole, sharded = rank["summary"]
        assert sharded == whole
        assert rank["local"] < whole[0]
