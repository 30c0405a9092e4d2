"""Callbacks that change weights, optimizers or accumulation leave the same behind as Lightning's, number for number."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).with_name("weights_runner.py")
SCENARIOS = {
    "11.11": ["accumulation_by_schedule"],
    "11.12": ["swa_plain", "swa_with_batch_norm", "swa_of_groups_linear_with_a_function", "swa_without_an_end"],
    "11.13": [
        "averaging_every_step",
        "averaging_parameters_only_while_accumulating",
        "averaging_by_epoch_with_own_function",
        "ema",
        "ema_sometimes",
    ],
    "11.14": ["backbone", "backbone_not_aligned", "finetuning_of_ones_own"],
    "11.15": [
        "pruning_lottery",
        "pruning_without_lottery",
        "pruning_by_number",
        "pruning_by_epoch",
        "pruning_after_validation",
        "pruning_by_layer",
        "pruning_at_random",
        "pruning_of_rows",
        "pruning_of_random_rows",
        "pruning_resampled",
        "pruning_not_permanent",
        "pruning_by_a_class",
        "pruning_nothing",
        "pruning_of_chosen_layers",
    ],
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with"
)


@cache
def results(library: str) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "results.json")
        command = [sys.executable, str(RUNNER), library, str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, dict[str, Any]] = json.loads(target.read_text())
    return found


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=pytest.mark.proves(item, *(["7.8"] if item in ("11.13", "11.15") else [])))
        for item, names in SCENARIOS.items()
        for name in names
    ],
)
def test_weights_learning_rates_and_checkpoints_are_those_of_lightning(scenario: str) -> None:
    ours, theirs = results("fulmen")[scenario], results("lightning.pytorch")[scenario]

    for what in theirs:
        assert ours[what] == theirs[what], what


def test_every_scenario_is_compared() -> None:
    assert set(results("fulmen")) == {name for names in SCENARIOS.values() for name in names}
