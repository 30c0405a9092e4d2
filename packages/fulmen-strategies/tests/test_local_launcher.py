"""Scripts that launch themselves, and ranks that fail in every way: run as a user runs them, judged by what is left.

This file is also the script: ``python test_local_launcher.py TASK CULPRIT PROCESSES FOLDER``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fulmen_protocols import MisconfigurationException, RankFailure, Topology
from fulmen_strategies import DDPStrategy, LightningEnvironment, LocalLauncher
from fulmen_strategies.launchers._command import script_index

pytestmark = pytest.mark.processes

# ---------------------------------------------------------------------------------------------------- the script


class Script:
    def __init__(self, task: str, culprit: int, processes: int, folder: Path) -> None:
        self.task, self.culprit, self.processes, self.folder = task, culprit, processes, folder
        self.environment = LightningEnvironment()
        self.strategy = DDPStrategy(timeout=timedelta(seconds=2 if task == "get stuck" else 60))
        self.rank = self.environment.local_rank()
        (folder / f"pid-{self.rank}").write_text(str(os.getpid()))

    def launch(self, function: object, processes: int | None = None) -> object:
        return LocalLauncher().launch(
            function,  # type: ignore[arg-type]
            num_processes=processes or self.processes,
            num_nodes=1,
            node_rank=0,
            main_address=self.environment.main_address,
            main_port=self.environment.main_port,
        )

    def join(self) -> None:
        self.strategy.setup_environment(
            Topology(
                devices=(torch.device("cpu"),) * self.processes,
                rank=self.rank,
                local_rank=self.rank,
                world_size=self.processes,
                main_address=self.environment.main_address,
                main_port=self.environment.main_port,
            )
        )

    def train(self) -> object:
        """All ranks meet in every step; in step 5 the culprit fails."""
        self.join()
        try:
            for step in range(100_000):
                if step == 5 and self.rank == self.culprit:
                    (self.folder / "failed-at").write_text(str(time.time()))
                    self.fail()
                if step == 5 and self.rank == 0 and self.task == "raise while rank 0 computes":
                    time.sleep(100)
                self.strategy.collectives.all_reduce(torch.ones(2))
                time.sleep(0.005)
        finally:
            self.strategy.teardown()
        return None

    def fail(self) -> None:
        if self.task.startswith("raise"):
            raise LookupError(f"sample 7 is missing on rank {self.rank}")
        if self.task == "exit":
            os._exit(3)
        if self.task == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.task == "abort":
            os.abort()
        if self.task == "sys.exit":
            sys.exit(5)
        if self.task == "get stuck":
            time.sleep(600)

    def work(self) -> object:
        self.join()
        total = self.strategy.collectives.all_reduce(torch.tensor(self.rank + 1.0), "sum").item()
        gathered = self.strategy.collectives.all_gather_object((os.getpid(), torch.get_num_threads()))
        self.strategy.teardown()
        return {"rank": self.rank, "total": total, "gathered": gathered}

    def run(self) -> None:
        if self.task == "work twice":
            os.chdir("/")  # the script was named by a relative path
            results = [self.launch(self.work), self.launch(self.work)]
            refusal = ""
            try:
                self.launch(self.work, processes=3)
            except MisconfigurationException as error:
                refusal = str(error)
            self.write({"results": results, "argv": sys.argv, "flags": sys.flags.dev_mode, "refusal": refusal})
            if self.rank == 1:  # rank 0 is through by then, and has to wait
                time.sleep(1.5)
                (self.folder / "rank 1 came to its end").touch()
        elif self.task == "fail late":
            self.launch(self.work)
            if self.rank == 1:
                time.sleep(1.0)
                raise LookupError("too late on rank 1")
        elif self.task == "catch":
            self.catch()
        else:
            self.launch(self.train)

    def catch(self) -> None:
        """Both ranks raise and catch the same error and go on; then rank 1 fails, and rank 0 catches that too."""

        def refuse() -> None:
            raise KeyError("the same on every rank")

        def fail_on_rank_1() -> None:
            self.join()
            if self.rank == 1:
                raise LookupError("sample 7 is missing on rank 1")
            self.strategy.collectives.barrier()

        caught: list[str] = []
        for function in (refuse, fail_on_rank_1):
            try:
                self.launch(function)
            except (KeyError, RankFailure) as error:
                caught.append(f"{type(error).__name__}: {error}")
        self.strategy.teardown()
        self.write(caught)

    def write(self, value: object) -> None:
        (self.folder / f"result-{self.rank}.json").write_text(json.dumps(value))


if __name__ == "__main__":
    Script(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])).run()
    sys.exit()

# ---------------------------------------------------------------------------------------------------- the judges


class Case(NamedTuple):
    task: str
    culprit: int
    processes: int


class Ended(NamedTuple):
    code: int
    output: str
    folder: Path
    seconds_after_failure: float

    @property
    def last_lines(self) -> str:
        return "\n".join(self.output.strip().splitlines()[-8:])

    @property
    def verdict(self) -> str:
        """What the launcher says last, of the rank that failed first; where the others stood comes before."""
        lines = self.last_lines.splitlines()
        starts = [at for at, line in enumerate(lines) if re.match(r"rank \d+ of \d+ .* first[,;]", line)]
        return "\n".join(lines[starts[-1] if starts else 0 :])

    def result(self, rank: int) -> object:
        return json.loads((self.folder / f"result-{rank}.json").read_text())


FAULTS = [
    Case("raise", 0, 2),
    Case("raise", 1, 2),
    Case("exit", 1, 2),
    Case("kill", 0, 2),
    Case("kill", 1, 3),
    Case("raise while rank 0 computes", 1, 2),
    Case("get stuck", 1, 3),
]
# Each case costs some seconds of importing torch.
MORE_FAULTS = [
    Case("exit", 0, 2),
    Case("kill", 1, 2),
    Case("raise", 2, 3),
    Case("kill", 0, 3),
    Case("get stuck", 1, 2),
    Case("get stuck", 0, 2),
    Case("abort", 1, 2),
    Case("sys.exit", 0, 2),
]
ALL_FAULTS = [pytest.param(case) for case in FAULTS] + [
    pytest.param(case, marks=pytest.mark.slow) for case in MORE_FAULTS
]
OTHERS = [Case("work twice", -1, 2), Case("fail late", 1, 2), Case("catch", 1, 2)]


def run(case: Case, folder: Path) -> Ended:
    folder.mkdir()
    here = Path(__file__)
    env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    flags = ["-Wignore", "-X", "dev"] if case.task == "work twice" else []
    arguments = [*flags, here.name, case.task, str(case.culprit), str(case.processes), str(folder)]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=here.parent, env=env, text=True, timeout=280,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    failed_at = folder / "failed-at"
    seconds = time.time() - float(failed_at.read_text()) if failed_at.exists() else 0.0
    return Ended(done.returncode, done.stdout, folder, seconds)


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Ended]:
    """All scripts of the selected tests, three at a time: each spends most of its life importing torch or waiting."""
    top = tmp_path_factory.mktemp("launched")
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {spec.params["case"] for spec in parameters if spec is not None and "case" in spec.params}
    cases = [case for case in FAULTS + MORE_FAULTS if case in selected] + OTHERS
    with ThreadPoolExecutor(3) as pool:
        outcomes = pool.map(lambda item: run(item[1], top / str(item[0])), enumerate(cases))
        return dict(zip(cases, outcomes, strict=True))


def alive(folder: Path) -> list[str]:
    found: list[str] = []
    for file in folder.glob("pid-*"):
        state = Path(f"/proc/{file.read_text()}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[-1].split()[0] != "Z":
            found.append(file.name)
    return found


@pytest.mark.proves("4.34")
@pytest.mark.parametrize("case", ALL_FAULTS, ids=lambda case: f"{case.task} on rank {case.culprit} of {case.processes}")
class TestWhenOneRankFails:
    def test_every_process_ends_within_ten_seconds(self, ended: dict[Case, Ended], case: Case) -> None:
        assert ended[case].code != 0
        stall_limit = 2 if case.task == "get stuck" else 0
        assert 0 < ended[case].seconds_after_failure < 10 + stall_limit
        assert len(list(ended[case].folder.glob("pid-*"))) == case.processes
        assert alive(ended[case].folder) == []

    def test_the_last_lines_name_the_rank_and_show_its_own_end(self, ended: dict[Case, Ended], case: Case) -> None:
        if case.task == "sys.exit":
            pytest.skip("rank 0 has asked to end without a word")
        last = ended[case].verdict
        end_of_culprit = {
            "exit": "exit code 3" if case.culprit else "os._exit",
            "kill": "SIGKILL" if case.culprit else "killed",
            "abort": "in fail",
            "get stuck": "in fail",
        }.get(case.task, f"LookupError: 'sample 7 is missing on rank {case.culprit}'".replace("'", ""))

        assert f"rank {case.culprit} of {case.processes}" in last or f"[rank{case.culprit}]" in last
        assert end_of_culprit in last
        assert "onnection closed" not in last, "that is only the consequence"


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("abort", 1, 2)])
def test_a_crash_in_native_code_shows_the_python_stack(ended: dict[Case, Ended], case: Case) -> None:
    assert "in fail" in ended[case].output


@pytest.mark.parametrize("case", [Case("raise while rank 0 computes", 1, 2)])
def test_rank_zero_is_stopped_with_the_exit_status_of_the_failed_rank(ended: dict[Case, Ended], case: Case) -> None:
    assert ended[case].code == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("sys.exit", 0, 2)])
def test_rank_zeros_own_exit_code_is_kept(ended: dict[Case, Ended], case: Case) -> None:
    assert ended[case].code == 5


@pytest.mark.proves("4.34")
class TestWhenAllGoesWell:
    case = OTHERS[0]

    def test_both_processes_run_the_function_and_meet(self, ended: dict[Case, Ended]) -> None:
        assert ended[self.case].code == 0, ended[self.case].output
        for rank in (0, 1):
            first, second = ended[self.case].result(rank)["results"]  # type: ignore[index]
            assert (first["rank"], first["total"]) == (rank, 3.0)
            assert first == second, "the second launch found the same processes"

    def test_nothing_is_printed(self, ended: dict[Case, Ended]) -> None:
        own = [line for line in ended[self.case].output.splitlines() if not line.startswith("[Gloo]")]  # torch 2.9's
        assert own == []

    def test_arguments_and_interpreter_flags_are_those_of_the_first(self, ended: dict[Case, Ended]) -> None:
        first, second = ended[self.case].result(0), ended[self.case].result(1)
        assert first["argv"][1:] == second["argv"][1:]  # type: ignore[index]
        assert second["flags"] is True  # type: ignore[index]

    @pytest.mark.proves("4.37")
    def test_the_cpus_are_shared_out(self, ended: dict[Case, Ended]) -> None:
        gathered = ended[self.case].result(0)["results"][0]["gathered"]  # type: ignore[index]
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        if "OMP_NUM_THREADS" not in os.environ:
            assert [threads for _, threads in gathered] == [share, share]

    def test_the_main_process_waits_for_the_others(self, ended: dict[Case, Ended]) -> None:
        assert (ended[self.case].folder / "rank 1 came to its end").exists()

    def test_another_number_of_processes_is_refused_on_every_rank(self, ended: dict[Case, Ended]) -> None:
        for rank in (0, 1):
            refusal = ended[self.case].result(rank)["refusal"]  # type: ignore[index]
            assert "3" in refusal
            assert "2" in refusal


@pytest.mark.proves("4.34")
def test_a_rank_that_fails_after_rank_zero_is_done_fails_the_program(ended: dict[Case, Ended]) -> None:
    late = ended[Case("fail late", 1, 2)]

    assert late.code == 1
    assert "[rank1]: LookupError: too late on rank 1" in late.last_lines


def test_errors_that_every_rank_catches_end_nothing_and_rank_failures_can_be_caught(ended: dict[Case, Ended]) -> None:
    caught = ended[Case("catch", 1, 2)]

    same, failure = caught.result(0)  # type: ignore[misc]
    assert same == "KeyError: 'the same on every rank'"
    assert failure.startswith("RankFailure: rank 1 of 2")
    assert "LookupError: sample 7 is missing on rank 1" in failure
    assert caught.code == 0, "the user has caught it"


# ---------------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.py", "--lr", "1"], 0),
        (["-u", "train.py"], 1),
        (["-X", "dev", "-W", "error", "train.py"], 4),
        (["-Wignore", "-Xdev", "train.py", "-m"], 2),
        (["-BW", "error", "train.py"], 2),
        (["--check-hash-based-pycs", "always", "train.py"], 2),
        (["-m", "package.module", "x"], 3),
        (["-Bm", "package.module"], 2),
        (["-c", "print(1)"], 2),
        (["-cprint(1)"], 1),
        ([], None),
        (["-i"], None),
        (["-"], None),
    ],
)
def test_the_script_is_found_among_the_interpreters_arguments(arguments: list[str], expected: int | None) -> None:
    assert script_index(arguments) == expected


def launch_here(function: object, processes: int = 1) -> object:
    return LocalLauncher().launch(
        function,  # type: ignore[arg-type]
        num_processes=processes, num_nodes=1, node_rank=0, main_address="127.0.0.1", main_port=1,
    )  # fmt: skip


def test_one_process_starts_nothing() -> None:
    hook, threads = sys.excepthook, threading.active_count()

    assert launch_here(lambda: 42) == 42
    assert (sys.excepthook, threading.active_count()) == (hook, threads)


@pytest.mark.proves("4.5")
def test_a_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-i"])

    with pytest.raises(MisconfigurationException, match="no script or module"):
        launch_here(lambda: 42, processes=2)


def test_a_process_that_somebody_else_has_started_just_runs_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert launch_here(lambda: 42, processes=2) == 42


@pytest.mark.proves("4.34")
@pytest.mark.parametrize(("task", "culprit"), [("kill", 0), pytest.param("exit", 1, marks=pytest.mark.slow)])
def test_every_process_ends_though_nobody_reads_what_it_prints(task: str, culprit: int, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    started = subprocess.Popen(
        [sys.executable, __file__, task, str(culprit), "2", str(tmp_path)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert started.stdout is not None
    started.stdout.close()

    assert started.wait(100) != 0
    until = float((tmp_path / "failed-at").read_text()) + 10
    while alive(tmp_path) and time.time() < until:
        time.sleep(0.1)
    assert len(list(tmp_path.glob("pid-*"))) == 2
    assert alive(tmp_path) == []


@pytest.mark.proves("4.34")
def test_a_module_can_be_launched(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "from fulmen_strategies import LightningEnvironment, LocalLauncher\n"
        "e = LightningEnvironment()\n"
        "print(LocalLauncher().launch(lambda: f'rank {e.local_rank()}', num_processes=2, num_nodes=1, node_rank=0,\n"
        "      main_address=e.main_address, main_port=e.main_port), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "train"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert sorted(done.stdout.split("\n")) == ["", "rank 0", "rank 1"], done.stderr
