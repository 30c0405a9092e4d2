"""What ``self.log`` records, wherever and however it is called, is what it records under Lightning."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("logging_runner.py")
LINES = RUNNER.read_text().splitlines()
SCENARIOS = [
    line.removeprefix("def ").partition("(")[0]
    for previous, line in itertools.pairwise(LINES)
    if previous == "@scenario"
]
lightning_is_needed = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


@cache
def results(library: str, what: str) -> dict[str, Any]:
    command = [sys.executable, str(RUNNER), library, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return found


def alike(ours: Any, theirs: Any) -> bool:
    """Equal but for the last digits: sums of the same numbers are added in another order."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return ours == pytest.approx(theirs, abs=3e-5, nan_ok=True)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return set(ours) == set(theirs) and all(alike(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    return bool(ours == theirs)


@lightning_is_needed
@pytest.mark.proves("6.12", "6.27")
@pytest.mark.slow
def test_values_can_be_logged_from_the_same_hooks_in_the_same_ways_with_the_same_outcome() -> None:
    ours, theirs = results("fulmen", "places"), results("lightning.pytorch", "places")

    assert set(ours) == set(theirs)
    assert {place: (ours[place], theirs[place]) for place in ours if not alike(ours[place], theirs[place])} == {}
    refused = {place for place, outcome in theirs.items() if outcome == "MisconfigurationException"}
    assert len(refused) > 100
    assert len(set(theirs) - refused) > 80


def comparable(scenario: str, seen: list[Any]) -> list[Any]:
    """What both libraries show at the same moment.

    With several loaders Lightning gives callbacks each loader's values when that loader ends, and none in the sanity
    check; fulmen all of them when the last loader has ended, in the sanity check too.
    """
    if "loader" not in scenario and "metric_objects" not in scenario:
        return seen
    sanity_check = next(index for index, (hook, *_) in enumerate(seen) if hook == "on_sanity_check_end") + 1
    within = ("on_validation_batch_start", "on_validation_batch_end", "on_test_batch_end")
    return [entry for entry in seen[sanity_check:] if entry[0] not in within]


@lightning_is_needed
@pytest.mark.proves("6.10", "6.13", "6.14", "6.15", "6.16", "6.17", "6.19", "6.20")
@pytest.mark.proves("6.21", "6.22", "6.23", "6.24", "6.25", "6.26", "6.27")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_metrics_read_inside_any_hook_rows_and_results_are_those_of_lightning(scenario: str) -> None:
    ours, theirs = results("fulmen", "views")[scenario], results("lightning.pytorch", "views")[scenario]

    mine, expected = comparable(scenario, ours["seen"]), comparable(scenario, theirs["seen"])
    assert [hook for hook, *_ in mine] == [hook for hook, *_ in expected]
    assert len(mine) > 15
    for index, (one, other) in enumerate(zip(mine, expected, strict=True)):
        for view, left, right in zip(("callback", "logged", "progress_bar"), one[1:], other[1:], strict=True):
            assert alike(left, right), (index, one[0], view, left, right)
    for name in ("after_fit", "validate", "after_validate", "test"):
        assert alike(ours[name], theirs[name]), (name, ours[name], theirs[name])
    for left, right in zip(ours["rows"], theirs["rows"], strict=True):
        if scenario == "an_axis_and_an_epoch_of_ones_own":  # Lightning leaves the epoch out where a step was logged
            left = [row if "v" in row else {k: v for k, v in row.items() if k != "epoch"} for row in left]
        assert alike(left, right), (left, right)
