"""What loops of one's own find beside the Fabric: helpers by Lightning's names, and loggers that it can log to."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import pytest
import torch

import fulmen_data
import fulmen_fabric
from fulmen import utilities
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen_fabric import Fabric, Throughput, ThroughputMonitor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.proves("8.22")
def test_a_fabric_logs_to_files_and_to_tensorboard(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0, flush_logs_every_n_steps=1)
    board = TensorBoardLogger(tmp_path, name="board", version=0)
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[logger, board])
    for step in range(2):
        fabric.log_dict({"loss": torch.tensor(1.0 / (step + 1)), "rate": 0.1}, step=step)
    for one in fabric.loggers:
        one.finalize("success")

    with open(tmp_path / "run" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], float(row["loss"]), float(row["rate"])) for row in rows] == [("0", 1.0, 0.1), ("1", 0.5, 0.1)]
    assert list((tmp_path / "board" / "version_0").glob("events.out.tfevents.*"))


@pytest.mark.proves("8.22")
def test_throughput_is_counted_and_logged_by_a_fabric(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0, flush_logs_every_n_steps=1)
    fabric = Fabric(accelerator="cpu", devices=1, loggers=logger)
    plain, monitor = Throughput(window_size=2), ThroughputMonitor(fabric, window_size=2)
    for number in (1, 2, 3):
        plain.update(time=2.0 * number, batches=number, samples=8 * number)
        monitor.update(time=2.0 * number, batches=number, samples=8 * number)
        logged = monitor.compute_and_log(step=number)

    assert plain.compute()["device/samples_per_sec"] == 4.0
    assert logged["device/batches_per_sec"] == 0.5


@pytest.mark.proves("8.22")
def test_helpers_have_lightnings_names(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)

    class Color(utilities.LightningEnum):
        RED = "red"

    assert utilities.is_shared_filesystem(fabric, tmp_path)
    assert Color.from_str("Red") is Color.RED
    assert fulmen_data.suggested_max_num_workers(1) >= 1
    assert fulmen_fabric.move_data_to_device({"a": [torch.ones(1)]}, "cpu")["a"][0].device == fabric.device
    for name in ("SpikeDetection", "measure_flops", "disable_possible_user_warnings"):
        assert callable(getattr(fulmen_fabric, name))
