"""Four gloo ranks on a mesh: data are split along data_parallel alone; the ranks of one model read and draw alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from integration_tests.mesh_data_script import BATCH, EPOCHS, SIZE

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("mesh_data_script.py")
WHOLE = sum(range(SIZE))


@cache
def ranks() -> list[dict[str, Any]]:
    folder = Path(mkdtemp(prefix="fulmen-mesh-"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)],
        capture_output=True, text=True, timeout=400, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]


def of(kind: str) -> list[Any]:
    return [rank[kind] for rank in ranks()]


def indices(rank: dict[str, Any], epoch: int) -> list[int]:
    return [index for row in rank["read"] if row[0] == epoch for index in row[2]]


@pytest.mark.proves("4.26")
def test_tensor_parallel_ranks_read_the_same_batches_and_data_parallel_ranks_share_the_samples_out() -> None:
    found = of("two parts")
    assert [one["kwargs"] for one in found] == [{"num_replicas": 2, "rank": rank // 2} for rank in range(4)]
    assert found[0]["read"] == found[1]["read"]
    assert found[2]["read"] == found[3]["read"]
    for epoch in range(EPOCHS):
        assert Counter(indices(found[0], epoch) + indices(found[2], epoch)) == Counter(range(SIZE))
    fabric = of("fabric")
    assert fabric[0] == fabric[1]
    assert fabric[2] == fabric[3]
    assert Counter(i for one in (fabric[0], fabric[2]) for batch in one for i in batch[0]) == Counter(range(SIZE))


@pytest.mark.proves("4.26")
def test_one_part_is_shuffled_alike_on_every_rank_without_a_seed() -> None:
    first, *others = of("one part")
    assert sorted(indices(first, 0)) == list(range(SIZE)) != indices(first, 0)
    for other in others:
        assert other["read"] == first["read"]  # with what the data set drew
        assert other["drawn"] == first["drawn"]


@pytest.mark.proves("4.26")
def test_the_ranks_of_one_model_draw_alike_in_steps_and_in_loader_workers() -> None:
    for kind in ("two parts", "workers"):
        found = of(kind)
        assert found[0]["drawn"] == found[1]["drawn"]
        assert found[2]["drawn"] == found[3]["drawn"]
        assert found[0]["read"] == found[1]["read"]
        assert found[2]["read"] == found[3]["read"]
    seeded = of("workers")
    assert [row[3] for row in seeded[0]["read"]] != [row[3] for row in seeded[2]["read"]]


def test_metrics_count_every_sample_once() -> None:
    for kind in ("two parts", "one part"):
        for rank in of(kind):
            assert rank["metrics"]["sum"] == WHOLE
            assert rank["metrics"]["object"] == WHOLE
            assert rank["metrics"]["mean"] == pytest.approx(WHOLE / SIZE)
    found = of("two parts")
    last = [sum(one["read"][-1][2]) for one in (found[0], found[2])]
    assert {one["metrics"]["step"] for one in found} == {float(sum(last))}


@pytest.mark.proves("4.26", "5.39")
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_epoch_goes_on_on_another_mesh_with_every_sample_once(parts: int) -> None:
    begun, resumed = of("begun"), of(f"resumed on {parts}")
    peers = 4 // parts
    for rank in range(4):
        assert resumed[rank]["read"] == resumed[rank - rank % peers]["read"], "the ranks of one model"
        assert resumed[rank]["drawn"] == resumed[rank - rank % peers]["drawn"]
    before = indices(begun[0], 1) + indices(begun[2], 1)
    assert len(before) == 2 * 2 * BATCH
    after = [index for rank in range(0, 4, peers) for index in indices(resumed[rank], 1)]
    assert Counter(before + after) == Counter(range(SIZE))


@pytest.mark.proves("4.26")
def test_a_resume_on_the_same_mesh_reads_and_draws_what_the_run_would_have() -> None:
    begun, resumed = of("begun"), of("resumed on 2")
    for rank in range(4):
        rows = [*begun[rank]["read"], *resumed[rank]["read"]]
        assert [row[:2] for row in rows] == [[e, b] for e in range(EPOCHS) for b in range(SIZE // (2 * BATCH))]
