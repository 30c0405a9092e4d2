"""Four real ranks, one of which fails: all end in time, and the last words are its number, its step and its own end.

A handful of the drill's runs; ``python -m tools.drills failures full`` makes all 48.
"""

from __future__ import annotations

import pytest
from tools.drills.failures import FAULTS, judge

DEFAULT = [("raise in training_step", 2)]  # test_local_launcher has others
MORE = [
    ("SIGKILL", 1),
    ("hang in Python", 0),
    ("one collective skipped", 1),
    ("sys.exit(3)", 2),
    ("sys.exit(3)", 0),
    ("SIGSEGV", 0),
    ("os._exit(7)", 3),
]


@pytest.mark.proves("4.34")
@pytest.mark.parametrize(
    ("fault", "culprit"), [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_the_culprit_of_four_ranks_is_named_last_with_its_step(fault: str, culprit: int) -> None:
    assert judge(fault, culprit)[0] == ""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise in training_step", "SIGKILL", "sys.exit(3)", "hang in Python"])
@pytest.mark.parametrize("starter", ["torchrun", "fulmen run"])
def test_under_an_agent_too_nobody_waits_for_the_dead(starter: str, fault: str) -> None:
    assert judge(fault, 1, starter=starter)[0] == ""


def test_the_drill_knows_thirteen_faults() -> None:
    assert len(FAULTS) == 13
