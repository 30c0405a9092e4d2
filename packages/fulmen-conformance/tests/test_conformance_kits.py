"""Every kit passes what is right and catches what is broken, by exactly the test that is meant to catch it.

``drills/`` holds one file for each kit: subclasses of the kit with a correct backend, and one for each way to be wrong.
The names in ``caught_by`` are all the kit tests that fail on it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fulmen_conformance

if TYPE_CHECKING:
    from types import ModuleType

DRILLS = Path(__file__).with_name("drills")


class Outcomes:
    """A pytest plugin that notes how each test of each class ended."""

    def __init__(self) -> None:
        self.failed: dict[str, set[str]] = defaultdict(set)
        self.passed: dict[str, set[str]] = defaultdict(set)
        self.xfailed: dict[str, dict[str, str]] = defaultdict(dict)
        self.text: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cls, test = report.nodeid.split("::")[1:]
        name = test.split("[")[0]
        if report.failed:
            self.failed[cls].add(name)
            self.text[cls, name] = report.longreprtext
        elif hasattr(report, "wasxfail"):
            self.xfailed[cls][name] = report.wasxfail
        elif report.when == "call" and report.passed:
            self.passed[cls].add(name)


@functools.cache
def outcomes_of(drill: str) -> Outcomes:
    """Run one drill file in this process, which has imported torch already."""
    outcomes = Outcomes()
    ini = DRILLS / "pytest.ini"
    plugins = ["no:cacheprovider", "no:timeout", "no:xdist", "no:terminal", "no:randomly"]
    options = [option for plugin in plugins for option in ("-p", plugin)]
    pytest.main([str(DRILLS / f"{drill}.py"), "-c", str(ini), "--rootdir", str(DRILLS), *options], [outcomes])
    return outcomes


def module_of(drill: str) -> ModuleType:
    if drill not in sys.modules:
        spec = importlib.util.spec_from_file_location(drill, DRILLS / f"{drill}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[drill] = module
        spec.loader.exec_module(module)
    return sys.modules[drill]


def drilled() -> list[tuple[str, str]]:
    names = sorted(path.stem for path in DRILLS.glob("drill_*.py"))
    return [(name, cls) for name in names for cls in vars(module_of(name)) if cls.startswith("Test")]


def marks(drill: str) -> list[pytest.MarkDecorator]:
    """Of the drills that start processes, for each broken backend anew or once."""
    if drill in ("drill_strategy_world", "drill_launcher"):
        return [pytest.mark.slow]
    return [pytest.mark.processes, pytest.mark.slow] if drill == "drill_collectives" else []


@pytest.mark.parametrize(("drill", "cls"), [pytest.param(*case, marks=marks(case[0])) for case in drilled()])
def test_a_kit_catches_exactly_what_is_broken(drill: str, cls: str) -> None:
    outcomes = outcomes_of(drill)

    expected: set[str] = getattr(module_of(drill), cls).caught_by
    texts = "\n\n".join(f"{name}: {text}" for (c, name), text in outcomes.text.items() if c == cls)
    assert outcomes.failed[cls] == expected, texts
    assert outcomes.passed[cls], "nothing ran"


def test_every_kit_is_drilled_with_right_and_with_several_wrong_backends() -> None:
    right: dict[str, int] = defaultdict(int)
    wrong: dict[str, int] = defaultdict(int)
    for drill, name in drilled():
        cls = getattr(module_of(drill), name)
        kit = next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("fulmen_conformance."))
        (wrong if cls.caught_by else right)[kit] += 1

    kits = {name for name in fulmen_conformance.__all__ if name.endswith("Conformance")}
    assert kits == set(right) == set(wrong)
    assert {kit: count for kit, count in wrong.items() if count < 3} == {}


def test_every_kit_test_says_what_to_look_at_when_it_fails() -> None:
    for kit in (getattr(fulmen_conformance, name) for name in fulmen_conformance.__all__):
        for name in dir(kit):
            if name.startswith("test_") and name != "test_nothing_is_switched_off":
                text = getattr(kit, name).__doc__ or ""
                last = text.rsplit(". ", 1)[-1].lower()
                assert "look" in text.lower() or "on failure" in last, f"{kit.__name__}.{name}"


def test_an_honest_xfail_shows_its_reason() -> None:
    assert outcomes_of("drill_switched_off").xfailed["TestHonest"] == {
        "test_its_name_is_one_lower_case_word": "the board's name is a trademark"
    }


def test_the_guard_itself_cannot_be_replaced() -> None:
    with pytest.raises(TypeError, match="test_nothing_is_switched_off"):
        type("TestSly", (fulmen_conformance.LoggerConformance,), {"test_nothing_is_switched_off": lambda self: None})
