"""Ranks with 7, 5, 9 and 0 batches, and evaluations of any number of samples, against one process and a formula."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SCRIPT = Path(__file__).with_name("uneven_script.py")
BATCHES_OF_RANKS = (7, 5, 9, 0)


@cache
def ranks(world: int) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(world), folder],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(world)]


def batches_of(rank: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(rank)
    sizes = torch.randint(1, 5, (BATCHES_OF_RANKS[rank],), generator=draw).tolist()
    return [torch.randn(size, 3, generator=draw, dtype=torch.float64) for size in sizes]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def in_one_process(*, accumulate: int = 1, clip: float | None = None, rounds: int = 9, epochs: int = 2) -> list[float]:
    """The weights after training on all samples of a round at once: gradient = sum of c*g / sum of c."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    of_ranks = [batches_of(rank)[:rounds] for rank in range(4)]
    for _ in range(epochs):
        for i in range(rounds):
            together = torch.cat([batches[i] for batches in of_ranks if i < len(batches)])
            (model(together).square().mean() / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == rounds:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()  # type: ignore[no-any-return]  # torch says Any of it


@pytest.mark.parametrize("strategy", ["", "fsdp "])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("sized", {}),
        ("unsized", {}),
        ("accumulated", {"accumulate": 2}),
        ("accumulated, unsized", {"accumulate": 4}),
        ("clipped", {"clip": 0.05}),
        ("manual", {}),
        ("few", {"rounds": 6, "epochs": 1}),
    ],
)
def test_ranks_with_7_5_9_and_0_batches_train_as_one_process_on_all_samples_would(
    case: str, options: dict[str, Any], strategy: str
) -> None:
    expected = in_one_process(**options)
    rounds, epochs = options.get("rounds", 9), options.get("epochs", 2)
    updates = -(-rounds // options.get("accumulate", 1)) * epochs

    for rank, seen in enumerate(ranks(4)):
        found = seen[strategy + case]
        torch.testing.assert_close(found["weights"], expected, rtol=1e-10, atol=1e-12)
        assert found["rounds"] == list(range(rounds)) * epochs, f"rank {rank} takes part in every round"
        assert found["hooks"] == rounds * epochs
        assert found["steps"] == updates
        assert found["batches"] in (rounds, None)


@pytest.mark.parametrize("case", ["sized", "unsized", "accumulated", "manual", "fsdp sized", "fsdp manual"])
def test_nothing_stays_of_the_batches_that_a_rank_borrows(case: str) -> None:
    own = [batches_of(rank) for rank in range(4)]
    samples = [sum(len(batch) for batch in batches) for batches in own]

    for rank, seen in enumerate(ranks(4)):
        assert seen[case]["counted"] == 2 * samples[rank], "a buffer holds the rank's own samples, of two epochs"
        assert seen[case]["metrics"]["samples"] == sum(samples), "self.log in the step is not heard"
        assert seen[case]["metrics"]["ends"] == sum(BATCHES_OF_RANKS), "nor in a hook of the batch"


def test_a_metric_of_an_epoch_weighs_every_real_sample_the_same() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    total = count = 0.0
    for _ in range(2):
        total = count = 0.0
        for i in range(9):
            here = [batches_of(rank)[i] for rank in range(4) if i < BATCHES_OF_RANKS[rank]]
            for batch in here:
                total += model(batch).square().mean().item() * len(batch)
                count += len(batch)
            model(torch.cat(here)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for seen in ranks(4):
        assert seen["sized"]["metrics"]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.slow
def test_an_evaluation_of_1_to_50_samples_equals_that_of_one_process(world: int) -> None:
    for seen in ranks(world):
        for samples in range(1, 51):
            numbers = [float(number) for number in range(1, samples + 1)]
            found = seen[f"evaluated {samples}"]
            assert found["mean"] == pytest.approx(sum(n * n for n in numbers) / samples, rel=1e-5), samples
            assert (found["sum"], found["max"], found["min"]) == (sum(numbers), samples, 1.0)


def test_an_evaluation_of_loaders_that_ranks_made_for_themselves_counts_every_sample_once() -> None:
    everything = torch.cat([batch for rank in range(4) for batch in batches_of(rank)]).float()

    for seen in ranks(4):
        found = seen["evaluated own"]
        rows = [batch.float() for rank in range(4) for batch in batches_of(rank)]
        mean = sum(batch.square().mean().item() * len(batch) for batch in rows) / len(everything)
        assert found["mean"] == pytest.approx(mean, rel=1e-5)
        assert found["sum"] == pytest.approx(everything.sum().item(), rel=1e-4)
        assert (found["max"], found["min"]) == (everything.max().item(), everything.min().item())


@pytest.mark.parametrize("case", ["joined", "joined, unsized", "joined, fsdp", "joined, fsdp, unsized"])
def test_an_evaluation_whose_forward_pass_is_a_collective_has_all_ranks_in_it(case: str) -> None:
    own = [[batch.float() for batch in batches_of(rank)] for rank in range(4)]
    everything = torch.cat([batch for batches in own for batch in batches])

    for rank, seen in enumerate(ranks(4)):
        found = seen[case]
        assert found["hooks"] == BATCHES_OF_RANKS[rank], "hooks hear of the rank's own batches alone"
        assert found["tested"] == min(BATCHES_OF_RANKS[rank], 6), "and so with a limit"
        assert found["counted"] == sum(len(batch) for batch in own[rank])
        assert found["metrics"]["sum"] == pytest.approx(everything.sum().item(), rel=1e-4)
        assert found["metrics"]["max"] == everything.max().item()


def test_a_loop_of_ones_own_trains_as_one_process_would() -> None:
    expected = in_one_process()
    for seen in ranks(4):
        torch.testing.assert_close(seen["fabric"], expected, rtol=1e-10, atol=1e-12)
