"""Saving inside an accumulation window of FSDP and of tensor parallel: real ranks, all cases in one run of them."""

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

from fulmen_checkpoint import TorchCheckpointIO

SCRIPT = Path(__file__).with_name("window_ranks_script.py")
KINDS = [
    "once, one file", "once, folder", "each, one file", "each, folder", "half", "manual", "tensor parallel",
    "tensor parallel, file",
]  # fmt: skip


@cache
def folder() -> Path:
    return Path(mkdtemp(prefix="windows-"))


@cache
def found(ranks: int) -> dict[str, Any]:
    if ranks == 1:
        found(2)  # whose checkpoints are loaded
    command = [sys.executable, str(SCRIPT), str(folder()), str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result: dict[str, Any] = torch.load(folder() / f"{ranks}.pt", weights_only=True)
    return result


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, torch.Tensor):
        return [tree.tolist()]
    if isinstance(tree, dict):
        return [(key, leaf) for key, value in tree.items() for leaf in leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


@pytest.mark.proves("5.39")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_save_inside_a_window_of_sharded_parameters_resumes_bit_for_bit(kind: str) -> None:
    case = found(2)[kind]
    assert leaves(case["expected"])
    for batch, resumed in case["resumed"].items():
        assert leaves(resumed) == leaves(case["expected"]), f"resumed after batch {batch}"


@pytest.mark.slow
def test_gradients_that_ranks_added_up_are_saved_once_and_others_of_each_rank() -> None:
    found(2)
    io = TorchCheckpointIO()

    def gradients(kind: str) -> Any:
        loaded: Any = io.load_checkpoint(folder() / kind / "batch-2")
        return loaded["fulmen"]["gradients"]

    each, once = gradients("each, folder"), gradients("once, folder")
    assert each["added"]["head.weight"].shape == (3, 6)
    assert each["own"] is None
    assert once["added"] == {}
    assert once["own"].shape[0] == 2
    names = [row[0] for row in once["layouts"][0]]
    assert set(names) == set(each["added"])
    assert names == [row[0] for row in once["layouts"][1]]
    # Without dropout's noise in common, two ranks with other samples have other gradients.
    assert once["own"][0].tolist() != once["own"][1].tolist()
    together = (once["own"].view(torch.float32).sum(0) / 2).tolist()
    reduced = [value for name in names for value in each["added"][name].flatten().tolist()]
    assert sorted(value for value in together if value) == pytest.approx(sorted(v for v in reduced if v), abs=1e-6)


@pytest.mark.proves("5.39")
def test_gradients_that_ranks_added_up_go_on_with_another_strategy() -> None:
    weights, _ = found(2)["each, by DDP"]
    expected, _ = found(2)["each, one file"]["expected"]
    for name, value in expected.items():
        # AdamW's first steps are of the size of its rate, 0.05: gradients that were lost would show.
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)


def test_another_number_of_ranks_is_told_why_a_window_cannot_go_on() -> None:
    told = found(1)
    for kind in ("fewer ranks", "fewer ranks, added up"):
        assert "inside an accumulation window by 2" in told[kind]
        assert "Resume with 2, or from a checkpoint that was saved at the end of a window." in told[kind]
    assert "cannot take" in told["no mesh"]
    assert "Resume with the strategy that saved it" in told["no mesh"]
