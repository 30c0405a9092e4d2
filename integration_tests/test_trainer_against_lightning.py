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
SCENARIOS = [
    line.removeprefix("def ").partition("(")[0]
    for previous, line in zip(RUNNER.read_text().splitlines(), RUNNER.read_text().splitlines()[1:], strict=False)
    if previous == "@scenario"
]

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


@pytest.mark.proves("3.11", "9.4", "9.5", "9.7", "9.8", "9.9", "9.10", "9.11", "9.16", "9.17", "9.20", "9.21", "9.31")
@pytest.mark.proves("9.33", "9.37", "9.38", "9.39", "9.40", "9.41", "9.42", "9.43", "9.44", "9.46", "9.47")
@pytest.mark.proves("A.2", "A.3", "A.6")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_users_see_the_same_as_under_lightning(scenario: str) -> None:
    assert seen("fulmen")[scenario] == seen("lightning.pytorch")[scenario]


def test_there_are_scenarios_to_compare() -> None:
    assert len(SCENARIOS) >= 21
