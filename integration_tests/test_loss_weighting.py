"""The same global batch gives the same update: losses with weights, split in every way, against one batch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from integration_tests.weighted_script import HALF, PADDED, Case, cases, on_a_mesh, reference, strategies, trained

from fulmen_protocols import CheckpointError

SCRIPT = Path(__file__).with_name("weighted_script.py")
OF_WORLD = [(world, name) for world in (1, 2) for name in strategies(world)]


@cache
def ranks(world: int, accelerator: str = "cpu") -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(world), folder, *([] if accelerator == "cpu" else [accelerator])],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        found = [torch.load(Path(folder, f"{world}-{rank}.pt"), weights_only=True) for rank in range(world)]
        if world == 2 and accelerator == "cpu":
            found[0]["files"] = {name: Path(folder, "2 ddp", name).read_bytes() for name in ("batch-3", "epoch")}
        return found


def assert_trained_as(found: dict[str, Any], expected: dict[str, Any], *, precision: str = "64-true") -> None:
    tolerance = 1e-12 if precision == "64-true" else 1e-6
    assert found["steps"] == expected["steps"]
    for what in ("gradients", "weights"):
        torch.testing.assert_close(found[what], expected[what], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("world", "strategy"), OF_WORLD)
def test_any_split_of_a_global_batch_gives_the_gradient_of_one_process_that_has_it_at_once(
    world: int, strategy: str
) -> None:
    for label, case in cases(world).items():
        expected = reference(case)
        for found in ranks(world):
            assert_trained_as(found[f"{label}, {strategy}"], expected, precision=case.precision)


def test_the_cases_tell_a_mean_of_means_from_the_mean() -> None:
    """Else the test above would prove nothing: micro-batches differ in their tokens, and some are empty."""
    for world in (1, 2):
        for case in cases(world).values():
            tokens = [int((targets != PADDED).sum()) for window in case.windows for _, targets in window]
            assert len(set(tokens)) > 1, case
        counts = [int((targets != PADDED).sum()) for case in cases(world).values() for own in case.batches
                  for _, targets in own]  # fmt: skip
        assert 0 in counts


@pytest.mark.parametrize(("world", "strategy"), OF_WORLD)
def test_a_window_of_nothing_but_padding_has_the_gradient_zero(world: int, strategy: str) -> None:
    for label in ("empty", "empty at first"):
        tokens = [
            sum(int((targets != PADDED).sum()) for _, targets in window) for window in cases(world)[label].windows
        ]
        assert 0 in tokens
        assert any(tokens)
        for found in ranks(world):
            result = found[f"{label}, {strategy}"]
            assert result["weights"].isfinite().all()
            assert [bool(each.any()) for each in result["gradients"]] == [count > 0 for count in tokens]


@pytest.mark.parametrize(("world", "strategy"), OF_WORLD)
def test_a_run_resumed_inside_a_window_ends_with_the_bits_of_one_that_was_not_interrupted(
    world: int, strategy: str
) -> None:
    for found in ranks(world):
        runs = found["resumed"][strategy]
        for batch, weights in runs["later"].items():
            assert torch.equal(weights, runs["whole"]), f"resumed after batch {batch}"


def test_fewer_ranks_go_on_at_the_end_of_an_epoch_and_not_inside_a_window(tmp_path: Path) -> None:
    files = ranks(2)[0]["files"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    alone = Case(30, 1, accumulate=3, rounds=8)

    found = trained("auto", alone, ckpt_path=tmp_path / "epoch", max_epochs=2)
    assert found["steps"] == 6, "three of the first epoch, of which it took none"
    assert found["gradients"].isfinite().all()
    assert found["gradients"].shape[0] == 3
    with pytest.raises(CheckpointError, match="saved inside an accumulation window by 2 processes"):
        trained("auto", alone, ckpt_path=tmp_path / "batch-3")


@pytest.mark.parametrize(("strategy", "precision"), [(name, each) for name, those in HALF.items() for each in those])
def test_in_half_precision_ranks_train_on_the_same_mean(strategy: str, precision: str) -> None:
    expected = reference(Case(50, 2, accumulate=2, rounds=4))["gradients"][0]
    for found in ranks(2):
        gradient = found[f"{precision}, {strategy}"]["gradients"][0].double()
        assert (gradient - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_their_data_count_it_once(world: int) -> None:
    for found in ranks(world):
        assert_trained_as(found["mesh"], reference(on_a_mesh(world // 2)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_loop_of_ones_own_gets_the_same_gradients(world: int) -> None:
    for found in ranks(world):
        assert_trained_as(found["fabric"], reference(cases(world)["tail"]))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", list(strategies(2)))
def test_two_gpus_train_as_one_process_and_never_wait_for_the_weights(strategy: str) -> None:
    for label, case in cases(2).items():
        for found in ranks(2, "cuda"):
            result = found[f"{label}, {strategy}"]
            if case.precision == "64-true":
                assert_trained_as(result, reference(case))
            else:
                torch.testing.assert_close(result["weights"], reference(case)["weights"], rtol=1e-4, atol=1e-5)
