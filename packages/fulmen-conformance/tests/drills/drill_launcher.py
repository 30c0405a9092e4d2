"""LauncherConformance passes a correct launcher and catches broken ones; they are in launchers.py."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from fulmen_conformance import LauncherConformance


class TestGood(LauncherConformance):
    caught_by: ClassVar[set[str]] = set()
    backend: ClassVar[str] = "Good"

    @pytest.fixture
    def factory(self) -> str:
        return f"{Path(__file__).with_name('launchers.py')}:{self.backend}"


def broken(backend: str, *tests: str) -> type[LauncherConformance]:
    """The drill with another backend, which exactly ``tests`` must catch."""
    return type(f"Test{backend}", (TestGood,), {"backend": backend, "caught_by": set(tests)})


TestNeverLooks = broken("NeverLooks", "test_an_error_on_another_rank_ends_the_run_with_its_traceback")
TestTextOfTheValue = broken(
    "TextOfTheValue",
    "test_one_process_runs_the_function_and_returns_its_value",
    "test_the_value_of_rank_zero_is_returned",
)
TestKillsNobody = broken(
    "KillsNobody", "test_an_error_on_rank_zero_ends_the_others", "test_kill_ends_the_processes_it_started"
)
