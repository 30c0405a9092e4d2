"""The same loops of one's own under Lightning's Fabric and ours leave the same behind; the import alone differs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("fabric_scenarios.py")
NAMES = {
    kind: re.findall(rf"^@{kind}\ndef (\w+)\(", RUNNER.read_text(), flags=re.MULTILINE)
    for kind in ("alone", "together")
}
LIBRARIES = ("fulmen", "lightning")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


@cache
def results(library: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank found."""
    hidden = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(RUNNER), library, folder, str(ranks)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            cwd=folder,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if ranks > 1:
            return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return [json.loads(line.removeprefix("RESULT"))]


def compare(ours: Any, theirs: Any, where: str = "") -> None:
    """Numbers to the last digits that another order of summation may change; everything else exactly."""
    if isinstance(theirs, dict) and "caught as" in theirs:
        assert ours is not None and theirs["caught as"][0] in ours["caught as"], where  # noqa: PT018
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name, value in theirs.items():
            compare(ours[name], value, f"{where}/{name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (mine, value) in enumerate(zip(ours, theirs, strict=True)):
            compare(mine, value, f"{where}/{number}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=2e-5), where
    else:
        assert ours == theirs, where


@pytest.mark.proves("8.2", "8.3", "8.4", "8.6", "8.7", "8.8", "8.9", "8.10", "8.11", "8.13", "8.14", "8.15", "8.16")
@pytest.mark.proves("8.17", "8.18", "8.19", "8.20")
@pytest.mark.parametrize("scenario", NAMES["alone"])
def test_a_loop_leaves_the_same_behind_as_under_lightnings_fabric(scenario: str) -> None:
    [ours], [theirs] = (results(library, 1) for library in LIBRARIES)
    compare(ours[scenario], theirs[scenario])


@pytest.mark.proves("8.3", "8.8", "8.10", "8.11", "8.12", "8.14", "8.18", "8.20")
@pytest.mark.parametrize("scenario", NAMES["together"])
@pytest.mark.slow
def test_two_ranks_leave_the_same_behind_as_under_lightnings_fabric(scenario: str) -> None:
    for mine, expected in zip(results("fulmen", 2), results("lightning", 2), strict=True):
        compare(mine[scenario], expected[scenario])


def test_there_are_scenarios_to_compare() -> None:
    assert len(NAMES["alone"]) + len(NAMES["together"]) >= 35
