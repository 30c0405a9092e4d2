"""The same small trainings under fulmen and under Lightning leave the same behind: rows, metrics, files, weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("scenario_runner.py")
SCENARIOS = [
    line.removeprefix("def ").partition("(")[0]
    for previous, line in zip(RUNNER.read_text().splitlines(), RUNNER.read_text().splitlines()[1:], strict=False)
    if previous == "@scenario"
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


@cache
def results(library: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(RUNNER), library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    found: dict[str, dict[str, Any]] = json.loads(line.removeprefix("RESULT"))
    return found


@pytest.mark.proves("5.19", "5.23", "5.24")
@pytest.mark.proves("6.13", "6.14", "6.16", "6.17", "6.21", "6.22", "6.23", "6.24", "6.26")
@pytest.mark.proves("9.4", "9.5", "9.10", "9.13", "9.14", "9.33", "9.39", "9.41", "9.42")
@pytest.mark.proves("10.3")
@pytest.mark.proves("11.6", "11.8")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_training_leaves_the_same_behind_as_under_lightning(scenario: str) -> None:
    ours, theirs = results("fulmen")[scenario], results("lightning.pytorch")[scenario]

    for name in ("global_step", "current_epoch", "files", "best", "predictions"):
        assert ours[name] == theirs[name], name
    # Sums of the same numbers in another order differ in the last digits.
    assert ours["weights"] == pytest.approx(theirs["weights"], abs=2e-5)
    for name in ("callback_metrics",):
        assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    for name in ("rows", "test"):
        assert len(ours[name]) == len(theirs[name]), name
        for mine, expected in zip(ours[name], theirs[name], strict=True):
            assert mine == pytest.approx(expected, abs=2e-5), name


def test_there_are_scenarios_to_compare() -> None:
    assert len(SCENARIOS) >= 40
