"""torch's pipelining with the model-parallel strategy, on two real processes, against one process with all layers."""

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
import torch
from integration_tests.pipeline_script import BATCH, EPOCHS, LAYERS, Part, samples
from torch.nn import functional as F

SCRIPT = Path(__file__).with_name("pipeline_script.py")


@cache
def run() -> Path:
    folder = Path(mkdtemp(prefix="fulmen-pipeline-"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder


def told(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run() / f"rank{rank}.json").read_text())
    return found


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run() / name, weights_only=True)
    return found


def one_process() -> tuple[Part, torch.optim.Optimizer, float]:
    """The whole model in a plain loop, on the batches that the first stage has read."""
    x, y = samples().tensors
    place = {value: index for index, value in enumerate(x[:, 0].tolist())}
    model = Part(range(LAYERS))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for batch in told(0)["seen"]:
        rows = [place[value] for value in batch]
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        losses.append(loss.item())
    epoch = losses[-(len(losses) // EPOCHS) :]
    return model, optimizer, sum(epoch) / len(epoch)


@pytest.mark.proves("4.26")
@pytest.mark.slow
def test_all_stages_read_the_same_batches() -> None:
    assert told(0)["seen"] == told(1)["seen"]
    assert {len(batch) for batch in told(0)["seen"]} == {BATCH}
    assert len(told(0)["seen"]) == 2 * EPOCHS


def test_a_pipeline_trains_as_one_process_and_its_file_is_that_of_the_whole_model() -> None:
    model, optimizer, loss = one_process()
    checkpoint = read("whole.ckpt")
    assert list(checkpoint["state_dict"]) == [f"part.{name}" for name in model.state_dict()]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(checkpoint["state_dict"][f"part.{name}"], value, rtol=1e-4, atol=1e-6)
    [state] = checkpoint["optimizer_states"]
    want = optimizer.state_dict()
    assert state["param_groups"] == want["param_groups"]
    assert state["state"].keys() == want["state"].keys()
    for number, entries in want["state"].items():
        for key, value in entries.items():
            torch.testing.assert_close(state["state"][number][key], value, rtol=1e-3, atol=1e-6)
    # Logged by the last stage alone, and known to the first, which writes to loggers.
    assert told(0)["loss"] == pytest.approx(loss, rel=1e-4)
    assert told(1)["loss"] == told(0)["loss"]


def test_a_pipeline_goes_on_from_its_file() -> None:
    resumed, whole = read("resumed.ckpt"), read("whole.ckpt")
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert resumed["global_step"] == whole["global_step"] == 2 * EPOCHS
