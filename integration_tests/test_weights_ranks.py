"""Callbacks that change weights or optimizers on two real processes: ranks stay equal, and numbers are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("weights_ranks_script.py")


def run(folder: Path, case: str, devices: int) -> list[dict[str, Any]]:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), case, str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert set(got) == set(want)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.proves("11.13")
def test_ranks_validate_save_and_end_with_one_average_which_is_that_of_each_step(tmp_path: Path) -> None:
    first, second = run(tmp_path / "ddp", "ema", 2)

    same(first["state"], second["state"])
    for ours, theirs in zip(first["validated"], second["validated"], strict=True):
        same(ours, theirs)
    same(torch.load(tmp_path / "ddp" / "saved.ckpt", weights_only=True)["state_dict"], first["state"])
    average = first["steps"][0]
    for weights in first["steps"][1:]:
        average = [0.5 * mean + 0.5 * now for mean, now in zip(average, weights, strict=True)]
    parameters = [value for name, value in first["state"].items() if "running" not in name and "num_" not in name]
    for got, want in zip(parameters, average, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("swa plain", marks=pytest.mark.proves("11.12")),
        pytest.param("backbone", marks=pytest.mark.proves("11.14")),
        pytest.param("accumulation", marks=pytest.mark.proves("11.11")),
    ],
)
@pytest.mark.slow
def test_two_ranks_train_as_one_process_does_with_their_batches_together(case: str, tmp_path: Path) -> None:
    first, second = run(tmp_path / "ddp", case, 2)
    (alone,) = run(tmp_path / "alone", case, 1)

    same(first["state"], second["state"])
    if case != "accumulation":  # there the two batches of an epoch differ by the order that each shuffle gives
        for name, value in alone["state"].items():
            torch.testing.assert_close(first["state"][name], value, msg=name)
    assert len(first["steps"]) == len(alone["steps"])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("swa", marks=pytest.mark.proves("11.12")),
        pytest.param("pruning", marks=[pytest.mark.proves("11.15"), pytest.mark.slow]),
    ],
)
def test_ranks_stay_equal_where_each_alone_would_draw_or_count_its_own(case: str, tmp_path: Path) -> None:
    first, second = run(tmp_path / "ddp", case, 2)

    parameters = [name for name in first["state"] if "running" not in name and "num_" not in name]
    for name in parameters:
        assert torch.equal(first["state"][name], second["state"][name]), name
    if case == "pruning":
        zeros = sum(int((value == 0).sum()) for value in first["state"].values())
        assert zeros == 54, "three tenths of 83 entries, rounded, three times of what is left"
    else:
        same(torch.load(tmp_path / "ddp" / "saved.ckpt", weights_only=True)["state_dict"], first["state"])
