"""Savers, stoppers and prediction writers on two real processes: ranks agree, and no sample is lost or repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("callback_ranks_script.py")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)


@cache
def ranks() -> list[dict[str, Any]]:
    folder = Path(mkdtemp())
    done = run(folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


EXPECTED = {
    "plain": [list(range(7))],
    "drop_last": [list(range(7))],
    "shuffle": [list(range(7))],
    "sampler": [[1, 4, 6]],
    "batch_sampler": [list(range(7))],
    "fewer samples than ranks": [[0]],
    "several": [list(range(7)), [0]],
}


@pytest.mark.proves("9.32", "11.16")
@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.slow
def test_every_sample_is_predicted_once_over_all_ranks_and_each_rank_knows_which_it_had(kind: str) -> None:
    found = [rank["predictions"][kind] for rank in ranks()]

    for loader, samples in enumerate(EXPECTED[kind]):
        seen: list[int] = []
        for rank in found:
            batches = [(indices, values) for indices, values, where in rank["batches"] if where == loader]
            assert all(values == [10 * index for index in indices] for indices, values in batches)
            assert rank["epoch"][loader] == [indices for indices, _ in batches]
            assert rank["returned"][loader] == [values for _, values in batches]
            seen += [index for indices, _ in batches for index in indices]
        assert sorted(seen) == samples, "exactly once, without padding"


@pytest.mark.proves("5.18", "5.23")
def test_ranks_save_in_rank_zeros_folder_and_only_what_all_of_them_find_better() -> None:
    first, second = (rank["kept"] for rank in ranks())

    assert first == second
    assert first["folder"] == "rank0/checkpoints", "each rank had a default_root_dir of its own"
    # Epoch 1 is better on rank 0 alone, epoch 2 on both, epoch 3 on rank 0 alone.
    assert first["files"] == ["epoch=2.ckpt", "last.ckpt"]
    assert first["ranked"] == [first["best"]] == ["rank0/checkpoints/epoch=2.ckpt"]


@pytest.mark.proves("5.23", "11.6")
def test_a_value_that_one_rank_logs_alone_saves_and_stops_on_all() -> None:
    for rank in ranks():
        # It falls from the first epoch on, so that patience ends after the third.
        assert rank["only_zero"] == {"files": ["epoch=0.ckpt"], "step": 6}


@pytest.mark.proves("5.29")
def test_ranks_resume_from_the_last_checkpoint_that_rank_zero_sees() -> None:
    for rank in ranks():
        # It was saved after 3 of 4 epochs of 2 steps.
        assert rank["resumed"] == {"from": "rank0/checkpoints/last.ckpt", "steps": 2}


@pytest.mark.proves("11.6")
def test_one_rank_that_has_lost_patience_stops_all_and_only_it_has_a_reason() -> None:
    first, second = (rank["stopped"] for rank in ranks())

    assert (first["epoch"], first["step"]) == (second["epoch"], second["step"]) == (2, 6)
    assert (first["reason"], first["message"]) == ("NOT_STOPPED", None)
    assert second["reason"] == "PATIENCE_EXHAUSTED"
    assert "did not improve" in second["message"]


@pytest.mark.proves("5.26")
def test_an_error_on_all_ranks_is_saved_by_all_together() -> None:
    for rank in ranks():
        assert rank["saved"] == ["x/epoch=0-step=1.ckpt"]
        assert rank["on_exception"] == 1
        assert not any("saved no checkpoint" in note for note in rank["failed"])


@pytest.mark.proves("5.26")
@pytest.mark.slow
def test_a_rank_that_fails_alone_saves_nothing_ends_the_run_and_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, "alone")

    assert done.returncode != 0
    assert "LookupError: on purpose" in done.stderr
    assert "saved no checkpoint, since other ranks have not failed" in done.stderr
    assert list(tmp_path.rglob("*.ckpt")) == []
