"""The kit for launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fulmen_conformance._kit import Kit

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LauncherConformance"]


class LauncherConformance(Kit):
    """Proves a ``Launcher``. Give the fixture ``factory``.

    Every test runs a small script in a new interpreter, as a user's script would be. The launched function learns its
    local rank from the variable ``LOCAL_RANK`` (missing: 0), the one that torchrun sets and that cluster environments
    read. A process that a launcher has started by executing the script again runs the function without a launcher.
    """

    @pytest.fixture
    def factory(self) -> str:
        """``"module:callable"`` or ``"/path/file.py:callable"``: of no arguments, returns the launcher under test."""
        raise NotImplementedError('define a fixture `factory` that returns "module:callable"')

    @pytest.fixture
    def runs_apart(self) -> bool:
        """Whether it is a ``LaunchesApart``: every launch has processes of its own, none of which is the caller's."""
        return False

    @pytest.fixture
    def timeout_s(self) -> float:
        """Seconds after which a launched script counts as hung."""
        return 90.0

    @pytest.fixture
    def kit_run(self, factory: str, timeout_s: float, tmp_path: Path) -> Callable[..., _Ended]:
        """Runs one task of the script. Not to be replaced."""

        def run(task: str, num_processes: int = 2) -> _Ended:
            return _run_script(task, factory, num_processes, timeout_s, tmp_path)

        return run

    def test_it_has_every_member_of_the_protocol(self, kit_run: Callable[..., _Ended]) -> None:
        """``Launcher`` has no optional member. On failure look at the names in the script's output."""
        kit_run("members", 1).succeeded()

    def test_one_process_runs_the_function_and_returns_its_value(self, kit_run: Callable[..., _Ended]) -> None:
        """On failure look at ``launch`` with ``num_processes=1``: the value comes back as the function returned it."""
        ended = kit_run("value", 1).succeeded()

        assert ended.value == {"local_rank": 0, "answer": [42, None, "text"]}
        assert len(ended.pids()) == 1

    def test_every_process_runs_the_function_once(self, kit_run: Callable[..., _Ended]) -> None:
        """On failure look at how many processes ``launch`` starts, and at ``LOCAL_RANK`` in each."""
        ended = kit_run("value", 2).succeeded()

        assert sorted(record["local_rank"] for record in ended.records) == [0, 1]
        assert len(ended.pids()) == 2

    def test_the_value_of_rank_zero_is_returned(self, kit_run: Callable[..., _Ended]) -> None:
        """On failure look at which process's result ``launch`` hands back."""
        ended = kit_run("value", 2).succeeded()

        assert ended.value == {"local_rank": 0, "answer": [42, None, "text"]}

    def test_launching_again_uses_the_same_processes(self, kit_run: Callable[..., _Ended], runs_apart: bool) -> None:
        """Test after fit. On failure look for processes that end after one call, or are started a second time.

        With ``runs_apart`` they are others each time.
        """
        ended = kit_run("twice", 2).succeeded()

        assert len(ended.records) == 4, f"two calls in two processes, but {ended.records}"
        assert len(ended.pids()) == (4 if runs_apart else 2)

    def test_no_process_outlives_the_main_one(self, kit_run: Callable[..., _Ended]) -> None:
        """A forgotten rank holds its device. On failure look at who ends the others when the script ends."""
        kit_run("value", 2).succeeded().nobody_lives()

    def test_an_error_on_another_rank_ends_the_run_with_its_traceback(self, kit_run: Callable[..., _Ended]) -> None:
        """Rank 0 waits while rank 1 fails. On failure look at who watches the processes while the function runs."""
        ended = kit_run("rank 1 fails", 2)

        assert ended.code != 0, f"the run ended well although rank 1 failed:\n{ended.output}"
        assert "this is rank 1's own error" in ended.output
        assert "rank 0 waited in vain" not in ended.output, "rank 0 went on although rank 1 was dead"
        ended.nobody_lives()

    def test_an_error_on_rank_zero_ends_the_others(self, kit_run: Callable[..., _Ended]) -> None:
        """On failure look at what happens to the other processes when the function raises here."""
        ended = kit_run("rank 0 fails", 2)

        assert ended.code != 0
        assert 'KeyError: "this is rank 0\'s own error"' in ended.output, "the error's own type is kept"
        ended.nobody_lives()

    def test_kill_ends_the_processes_it_started(self, kit_run: Callable[..., _Ended]) -> None:
        """On failure look at ``kill``: which processes get the signal? Not this one."""
        ended = kit_run("kill", 2).succeeded()

        assert ended.value == "the main process goes on"
        ended.nobody_lives()

    def test_it_says_whether_it_works_in_a_notebook(self, kit_run: Callable[..., _Ended]) -> None:
        """On failure look at ``is_interactive_compatible``: a plain bool."""
        assert type(kit_run("interactive", 1).succeeded().value) is bool


class _Ended:
    """A script that has ended, and what it left."""

    def __init__(self, code: int | None, output: str, folder: Path) -> None:
        self.code, self.output = code, output
        self.records: list[dict[str, Any]] = [json.loads(f.read_text()) for f in sorted(folder.glob("call-*.json"))]
        value = folder / "value.json"
        self.value: object = json.loads(value.read_text()) if value.exists() else None

    def pids(self) -> set[int]:
        return {int(record["pid"]) for record in self.records}

    def succeeded(self) -> _Ended:
        if self.code is None:
            pytest.fail(f"the script hung and was killed; its output:\n{self.output}")
        assert self.code == 0, f"the script ended with {self.code}; its output:\n{self.output}"
        return self

    def nobody_lives(self) -> None:
        if self.code is None:
            pytest.fail(f"the script hung and was killed; its output:\n{self.output}")
        deadline = time.monotonic() + 15
        alive = self.pids()
        while alive and time.monotonic() < deadline:
            alive = {pid for pid in alive if _is_alive(pid)}
            time.sleep(0.05)
        for pid in alive:
            os.kill(pid, signal.SIGTERM)
        assert not alive, f"processes {sorted(alive)} still lived 15 s after the script had ended"


def _run_script(task: str, factory: str, num_processes: int, timeout_s: float, folder: Path) -> _Ended:
    script = Path(__file__).with_name("_launched.py")
    variables = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    variables["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), task, factory, str(num_processes), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=folder,
        )
        code: int | None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    ended = _Ended(code, (folder / "output").read_text(errors="replace"), folder)
    if code is None:  # its children may live on
        for pid in ended.pids():
            if _is_alive(pid):
                os.kill(pid, signal.SIGTERM)
    return ended


def _is_alive(pid: int) -> bool:
    try:
        # A child whose parent died is reaped by init, or stays as a zombie where nobody reaps: that is no process.
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    else:
        return state != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
