"""The same command lines under fulmen and under Lightning: what is parsed, built, refused and trained is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow

RUNNER = Path(__file__).parent / "cli_scenarios.py"


def scenarios(library: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    ran = subprocess.run(
        [sys.executable, str(RUNNER), library], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    results: dict[str, Any] = json.loads(ran.stdout)
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cli")
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(scenarios, "fulmen", folder / "ours")
        theirs = pool.submit(scenarios, "lightning.pytorch", folder / "theirs")
        return ours.result(), theirs.result()


@pytest.mark.proves("12.1", "12.2", "12.3", "12.5", "12.6", "12.7", "12.9")
@pytest.mark.timeout(300)
def test_every_command_line_leads_to_what_it_leads_to_in_lightning(both: tuple[Any, Any]) -> None:
    ours, theirs = both

    assert len(ours) > 50
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.proves("12.1", "12.3")
@pytest.mark.timeout(300)
def test_the_scenarios_reach_what_they_are_about(both: tuple[Any, Any]) -> None:
    ours, _ = both

    assert ours["two configs"]["model_config"] | {"encoder": None} == {"lr": 0.8, "hidden": 2, "encoder": None}
    assert ours["two configs"]["max_epochs"] == 4
    assert ours["an argument before a config"]["lr"] == 0.7
    assert ours["the environment"]["lr"] == 0.35
    assert ours["callbacks"]["callbacks"] == [
        ["Count", 4, "t"],
        "EarlyStopping",
        ["Count", 1, "second"],
        "SaveConfigCallback",
    ]
    assert ours["chosen callables"]["optimizers"] == ["Adam", 0.05, "StepLR", None]
    assert ours["links"]["hidden"] == 8
    assert ours["links"]["lr"] == 15
    assert (ours["fit"]["steps"], ours["fit"]["subcommand"]) == (3, "fit")
    assert ours["options for one subcommand"]["hidden"] == 12
    assert [ours[name] for name in ("a wrong number", "an unknown argument", "no class")] == [{"exit": 2}] * 3
