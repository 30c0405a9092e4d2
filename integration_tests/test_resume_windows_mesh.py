"""Stopping and killing runs inside an accumulation window of a pipeline, of hybrid shards and of a 2D mesh."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from integration_tests.window_mesh_script import CASES, CLOSED, SAVED

SCRIPT = Path(__file__).with_name("window_mesh_script.py")


@cache
def folder() -> Path:
    return Path(mkdtemp(prefix="windows-on-meshes-"))


@cache
def found(ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each case what it became when nobody stopped it, and when it went on after each of its checkpoints."""
    for stage in ("begin", "resume"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(folder()), str(ranks), stage],
            capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        said = (done.stdout + done.stderr)[-6000:]
        assert (done.returncode == 0) == (stage == "resume"), said
        assert stage == "resume" or "SIGKILL" in said, said
    whole, resumed = (torch.load(folder() / f"{stage}-{ranks}.pt", weights_only=True) for stage in ("begin", "resume"))
    return whole, resumed


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, torch.Tensor):
        return [tree.tolist()]
    if isinstance(tree, dict):
        return [(key, leaf) for key, value in tree.items() for leaf in leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


@pytest.mark.proves("5.39")
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_a_run_stopped_or_killed_inside_a_window_goes_on_bit_for_bit(ranks: int, case: str) -> None:
    whole, resumed = found(ranks)

    weights, _, steps = whole[case]
    assert steps == 2
    assert weights
    assert list(resumed[case]) == list(SAVED)
    for batch, outcome in resumed[case].items():
        assert leaves(outcome) == leaves(whole[case]), f"resumed after batch {batch}"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [(2, "pipeline"), (4, "pipeline of shards")])
def test_a_pipeline_saves_gradients_while_a_later_step_needs_them(ranks: int, case: str) -> None:
    """Nobody calls ``manual_backward``: the schedule runs backward passes by itself."""
    found(ranks)

    def gradients(batch: int) -> Any:
        return torch.load(folder() / case / f"batch-{batch}", weights_only=True)["fulmen"]["gradients"]

    assert gradients(CLOSED) is None
    for batch in SAVED:
        held = gradients(batch)
        assert held["added"] or held["own"] is not None
