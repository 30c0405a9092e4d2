"""What users see of the Trainer is what Lightning shows them, run in the same test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("trainer_scenarios.py")
PROVES = {
    "validation_intervals": ("9.9", "9.10"),
    "validation_by_the_clock": ("9.9", "9.10"),
    "limits_of_a_run": ("9.5", "9.41"),
    "requests_to_stop": ("9.42",),
    "estimated_steps": ("9.47",),
    "batches_of_loaders": ("9.7", "9.33", "9.37"),
    "limits_of_evaluation": ("9.7",),
    "overfitting": ("9.4", "9.8"),
    "quick_run": ("9.4",),
    "reading_ahead": ("9.37",),
    "outputs_of_steps": ("9.38", "9.39"),
    "steps_that_fetch_their_batches": ("9.37",),
    "schedules": ("9.40",),
    "own_scheduler": ("9.40",),
    "arguments_of_calls": ("9.20", "9.21"),
    "readings": ("9.43", "9.44", "9.46", "A.2", "A.3", "A.6"),
    "sanity_check": ("9.11",),
    "modes_of_modules": ("9.16", "9.31"),
    "loaders_made_anew": ("9.17", "9.33"),
    "changes_during_a_run": ("9.46", "A.2"),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


@cache
def seen(library: str) -> dict[str, Any]:
    command = [sys.executable, str(RUNNER), library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return found


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=pytest.mark.proves(*items)) for name, items in PROVES.items()]
)
def test_users_see_the_same_as_under_lightning(scenario: str) -> None:
    assert seen("fulmen")[scenario] == seen("lightning.pytorch")[scenario]


def test_every_scenario_is_compared() -> None:
    assert set(seen("fulmen")) == set(PROVES)
