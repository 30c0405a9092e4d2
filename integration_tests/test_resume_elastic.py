"""A run saved inside an epoch by some ranks goes on on others: every sample of the epoch once, by its index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("elastic_ranks_script.py")
SIZE, BATCH = 48, 2


def run(folder: Path, ranks: int, kind: str = "plain", *, stop: int = 0, resume: Path | None = None) -> list[Any]:
    """What each rank reports."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder), str(ranks), kind, str(stop), str(resume or "-")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    files = [folder / f"rank{rank}-of-{ranks}.json" for rank in range(ranks)]
    assert all(file.exists() for file in files), (done.stdout + done.stderr)[-4000:]
    return [json.loads(file.read_text()) for file in files]


def samples(reports: list[Any], epoch: int) -> list[int]:
    """In the order over ranks: the first sample of each rank's batch, the second of each, ..."""
    rounds = zip(*([row for row in report["read"] if row[0] == epoch] for report in reports), strict=True)
    return [index for batches in rounds for parts in zip(*(b[2] for b in batches), strict=True) for index in parts]


@pytest.mark.proves("5.38", "5.39")
@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 1), (1, 2), (4, 2))]
)
def test_a_run_goes_on_on_another_number_of_ranks_with_every_sample_of_the_epoch_once(
    before: int, after: int, tmp_path: Path
) -> None:
    per_epoch = SIZE // (before * BATCH)
    stop = per_epoch + 2  # in the second epoch
    first = run(tmp_path / "first", before, stop=stop)
    second = run(tmp_path / "second", after, resume=tmp_path / "first" / "saved.ckpt")

    for reports in (first, second):
        assert all(report.get("refused") is None for report in reports)
    for report in second:
        assert report["weights"] == first[0]["saved"]
        assert len(report["momenta"]) == 2
        assert (report["epoch"], report["metrics"].keys()) == (3, second[0]["metrics"].keys())
    assert Counter(samples(first, 0)) == Counter(range(SIZE))
    ledger = samples(first, 1) + samples(second, 1)
    assert Counter(ledger) == Counter(range(SIZE)), "the epoch that was interrupted"
    assert Counter(samples(second, 2)) == Counter(range(SIZE)), "the next one"
    indices = [row[1] for row in second[0]["read"] if row[0] == 1]
    whole = SIZE // (after * BATCH)
    assert indices == list(range(whole - len(indices), whole)), "batches are counted as these ranks would have"
    assert second[0]["step"] == stop + len(second[0]["read"])
    if before > 1:
        unbroken = run(tmp_path / "unbroken", before, stop=2 * per_epoch)
        assert ledger == samples(unbroken, 1), "in the order of the run that was never stopped"


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_max_steps_ended_inside_an_epoch_goes_on_there_on_any_number_of_ranks(
    after: int, tmp_path: Path
) -> None:
    first = run(tmp_path / "first", 2, "max_steps", stop=2 * 12 + 5)
    second = run(tmp_path / "second", after, "max_steps", resume=tmp_path / "first" / "saved.ckpt")
    assert (first[0]["epoch"], second[0]["epoch"]) == (3, 3)
    assert Counter(samples(first, 2) + samples(second, 2)) == Counter(range(SIZE))
    assert second[0]["metrics"]["mean_index"] == pytest.approx((SIZE - 1) / 2)


@pytest.mark.slow
def test_the_metric_of_an_epoch_counts_the_batches_of_all_ranks_before_and_after(tmp_path: Path) -> None:
    run(tmp_path / "first", 2, stop=2 * 12 + 5)  # in the last epoch
    second = run(tmp_path / "second", 1, resume=tmp_path / "first" / "saved.ckpt")
    assert second[0]["metrics"]["mean_index"] == pytest.approx((SIZE - 1) / 2)


@pytest.mark.proves("5.38")
@pytest.mark.slow
def test_a_sampler_that_splits_by_itself_is_refused_on_another_number_of_ranks(tmp_path: Path) -> None:
    run(tmp_path / "first", 2, "user's sampler", stop=3)
    second = run(tmp_path / "second", 1, "user's sampler", resume=tmp_path / "first" / "saved.ckpt")

    assert second[0]["read"] == []
    refused = second[0]["refused"]
    assert "saved in the middle of an epoch by 2 ranks and is loaded on 1; DistributedSampler decides" in refused
    assert "Resume on 2 ranks, or from a checkpoint of an epoch's end" in refused
