"""What a step of the Trainer may execute, counted: a regression of a microsecond shows here and in no timing."""

from __future__ import annotations

import json

import pytest
from tools.bench.instructions import BUDGET, CONFIGS, measure

pytestmark = pytest.mark.timeout(300)

QUICK = ("bare", "bare+idle50", "log")
OTHERS = tuple(config for config in CONFIGS if config not in QUICK)


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, float]]:
    return measure(QUICK)


@pytest.fixture(scope="module")
def other_counts() -> dict[str, dict[str, float]]:
    return measure(OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("config", QUICK)
def test_a_step_executes_no_more_than_its_budget(counts: dict[str, dict[str, float]], config: str) -> None:
    hold(config, counts[config])


@pytest.mark.slow
@pytest.mark.parametrize("config", OTHERS)
def test_other_steps_execute_no_more_than_theirs(other_counts: dict[str, dict[str, float]], config: str) -> None:
    hold(config, other_counts[config])


def hold(config: str, counts: dict[str, float]) -> None:
    allowed = json.loads(BUDGET.read_text(encoding="utf-8"))[config]

    for what, count in counts.items():
        assert count <= allowed[what], (
            f"a {config!r} step executes {count} {what}, its budget is {allowed[what]}. If that is worth it, "
            "record it: python -m tools.bench.instructions --write"
        )


def test_fifty_callbacks_that_define_no_hook_add_nothing_to_a_step(counts: dict[str, dict[str, float]]) -> None:
    assert counts["bare+idle50"] == counts["bare"]
