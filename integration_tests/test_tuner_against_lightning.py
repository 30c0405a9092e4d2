"""The tuner finds what Lightning's finds, with the same module, data and seed; and it works on several ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from integration_tests.tuner_runner import SEARCHES, SIZES

RUNNER = Path(__file__).with_name("tuner_runner.py")

needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(RUNNER), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@cache
def results(library: str) -> dict[str, dict[str, Any]]:
    line = next(line for line in run(library).splitlines() if line.startswith("RESULT"))
    found: dict[str, dict[str, Any]] = json.loads(line.removeprefix("RESULT"))
    return found


@needs_lightning
@pytest.mark.proves("13.1")
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.slow
def test_curve_and_suggestion_are_those_of_lightning(name: str) -> None:
    ours, theirs = results("fulmen")["lr"][name], results("lightning.pytorch")["lr"][name]

    assert ours["lrs"] == theirs["lrs"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["suggestion"] == theirs["suggestion"]
    assert ours["lr"] == theirs["lr"] == (ours["suggestion"] or 0.02)  # too few points suggest nothing


@needs_lightning
@pytest.mark.proves("13.1")
def test_the_searches_end_where_they_should() -> None:
    points = {name: len(found["loss"]) for name, found in results("fulmen")["lr"].items()}

    assert points["never stopping"] == points["exponential"] == 60
    assert points["diverging"] < 60
    assert points["strict"] < 60


@needs_lightning
@pytest.mark.proves("13.2")
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.slow
def test_the_sizes_found_are_those_of_lightning(name: str) -> None:
    assert results("fulmen")["sizes"][name] == results("lightning.pytorch")["sizes"][name]


@pytest.mark.proves("13.1", "13.2")
@pytest.mark.slow
def test_two_ranks_find_one_learning_rate_and_no_batch_size(tmp_path: Path) -> None:
    run("fulmen", "ranks", str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))

    assert first == second
    assert first["unchanged"]
    assert first["lr_of_module"] in first["lr"]
    assert "run of 2 processes" in first["refused"]
    assert "devices=1" in first["refused"]
