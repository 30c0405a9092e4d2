"""Hooks are called in Lightning's order: compared with Lightning itself, run in this test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

RECORDER = Path(__file__).with_name("hook_recorder.py")
SCENARIOS = [
    "plain", "scheduler", "clipping", "manual", "accumulation", "interval", "two_epochs", "max_steps", "zero_epochs",
    "skip_epoch", "several_val", "datamodule", "validate", "test", "predict", "fit_then_test", "save_and_resume",
]  # fmt: skip


@cache
def orders(library: str) -> dict[str, list[str]]:
    command = [sys.executable, str(RECORDER), library, "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ORDER"))
    found: dict[str, list[str]] = json.loads(line.removeprefix("ORDER"))
    return found


@pytest.mark.proves("5.6", "5.7")
@pytest.mark.proves("9.23", "9.25", "9.26", "9.27", "9.28", "9.30", "9.33", "9.39")
@pytest.mark.proves("10.2", "10.3", "10.4", "10.5", "10.16", "10.17")
@pytest.mark.proves("11.1")
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_hooks_are_called_in_the_same_order_as_by_lightning(scenario: str) -> None:
    assert orders("fulmen")[scenario] == orders("lightning.pytorch")[scenario]


@pytest.mark.proves("9.27")
def test_a_plain_fit_calls_its_hooks_in_the_documented_order() -> None:
    order = [call for call in orders("fulmen")["plain"] if call.startswith("module.")]

    batch = [
        "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "on_train_batch_start",
        "optimizer_step", "training_step", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward",
        "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping",
        "on_train_batch_end",
    ]  # fmt: skip
    first = order.index("module.on_train_epoch_start") + 1
    assert order[first : first + len(batch)] == [f"module.{name}" for name in batch]
