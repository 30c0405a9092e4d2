"""SpikeDetection in a Fabric loop of one process and of two."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen_fabric import Fabric, SpikeDetection, TrainingSpikeException
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.processes


def run(detection: SpikeDetection, losses: Sequence[float], first: int = 0) -> int | None:
    """The batch at which the loop ends, None if it goes through."""
    fabric = Fabric(accelerator="cpu", callbacks=detection)
    for index, loss in enumerate(losses, start=first):
        try:
            fabric.call("on_train_batch_end", fabric=fabric, loss=torch.tensor(loss), batch=None, batch_idx=index)
        except TrainingSpikeException as error:
            return error.batch_idx
    return None


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.proves("11.17")
def test_a_jump_ends_the_loop_and_both_batches_are_written(tmp_path: Path) -> None:
    detection = SpikeDetection()
    assert run(detection, [1.0, 0.9, 1.1, 0.8, 5.0, 1.0]) == 4
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [3, 4]
    assert detection.bad_batches == [3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["skip_batches.json"]


@pytest.mark.proves("11.17")
@pytest.mark.parametrize(
    ("options", "losses", "spike"),
    [
        ({}, [1.0, 3.0], 1),  # at rtol=2 exactly: |3 - 1| >= 2 · 1
        ({}, [1.0, 2.9], None),
        ({"rtol": None, "atol": 0.5}, [1.0, 1.4, 1.75], 2),
        ({"atol": 10.0}, [1.0, 5.0], None),  # both tolerances must be passed
        ({"mode": "max"}, [4.0, 3.0, 2.0, -9.0], 3),
        ({"mode": "max"}, [4.0, 30.0], None),  # better
        ({"rtol": 0.1, "window": 2}, [1.0, 9.0], 1),
        ({"rtol": 0.5, "window": 2}, [9.0, 8.0, 2.0, 2.0, 2.5, 3.5], 5),  # the mean of 2.0 and 2.5
        ({"rtol": 0.5, "window": 6}, [9.0, 8.0, 2.0, 2.0, 2.5, 3.5], 4),  # far below the mean of all, and worse
        ({"warmup": 3}, [1.0, 50.0, 1.0, 50.0], None),  # the mean has seen 50
        ({"warmup": 0}, [7.0, 1.0], None),
        ({}, [1.0, math.nan], 1),
        ({}, [1.0, -math.inf], 1),
        ({"finite_only": False}, [1.0, math.nan, 1.0, 9.0], 3),
        ({"finite_only": False}, [1.0, -math.inf, 1.0], None),
        ({"finite_only": False}, [1.0, math.inf], 1),
        ({"warmup": 2}, [math.nan, math.inf, 1.0, 9.0], 3),  # what is not finite never enters the mean
    ],
)
def test_what_is_a_spike(options: dict[str, Any], losses: list[float], spike: int | None) -> None:
    assert run(SpikeDetection(**options), losses) == spike


@pytest.mark.proves("11.17")
@pytest.mark.parametrize(
    ("given", "found"), [("here.json", "here.json"), ("folder", "folder/skip_batches.json"), ("a/b.json", "a/b.json")]
)
def test_the_path_is_a_file_or_a_folder(tmp_path: Path, given: str, found: str) -> None:
    assert run(SpikeDetection(exclude_batches_path=given), [1.0, 9.0]) == 1
    assert json.loads((tmp_path / found).read_text()) == [0, 1]


@pytest.mark.proves("11.17")
def test_a_loaded_state_goes_on_as_if_it_had_not_stopped() -> None:
    losses = [1.0, 1.4, 1.2, 1.3]
    saved = SpikeDetection(window=3, rtol=0.5)
    assert run(saved, losses) is None
    state = json.loads(json.dumps(saved.state_dict()))  # plain data

    loaded = SpikeDetection(window=3)
    loaded.load_state_dict(state)
    assert loaded.state_dict() == saved.state_dict()
    for detection in (saved, loaded):
        assert run(detection, [2.0, 2.1], first=4) == 4, "against the mean of the three losses before"
    assert loaded.bad_batches == [3, 4]


def test_a_state_of_lightnings_loads_without_its_losses() -> None:
    theirs = {
        "last_val": 1.0, "mode": "max", "warmup": 2, "atol": None, "rtol": 3.0, "bad_batches": [4, 5],
        "bad_batches_path": "x.json", "running": {}, "mean": {},
    }  # fmt: skip
    detection = SpikeDetection()
    detection.load_state_dict(theirs)
    assert (detection.mode, detection.warmup, detection.rtol, detection.bad_batches) == ("max", 2, 3.0, [4, 5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, r"mode='median'\): use 'min' or 'max'"),
        ({"window": 0}, r"window=0\): use the mean of 1 loss or more"),
        ({"warmup": -1}, r"warmup=-1\): use 0 batches or more"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        SpikeDetection(**options)


def test_the_exception_is_a_runtime_error_that_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TrainingSpikeException(3)))
    assert isinstance(error, RuntimeError)
    assert error.batch_idx == 3
    assert str(error) == "Training spike detected in batch 3"


SCRIPT = """
import json, sys, torch
from fulmen_fabric import Fabric, SpikeDetection, TrainingSpikeException

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, callbacks=SpikeDetection(exclude_batches_path=sys.argv[1]))
    fabric.launch()
    fails = None
    for index in range(5):
        loss = torch.tensor(9.0 if fabric.global_rank == 1 and index == 3 else 1.0)
        try:
            fabric.call("on_train_batch_end", fabric=fabric, loss=loss, batch=None, batch_idx=index)
        except TrainingSpikeException as error:
            fails = error.batch_idx
            break
    with open(f"{sys.argv[1]}/rank{fabric.global_rank}.txt", "w") as file:
        file.write(str(fails))
    fabric.close()
"""


@pytest.mark.proves("11.17")
@pytest.mark.slow
def test_a_spike_on_one_of_two_ranks_ends_both(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["3", "3"]
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [2, 3]
