"""Real ranks that are ended early: all stop at the same step, leave a whole checkpoint, and go on bit for bit.

SLURM's part is played as it plays it: this test starts every task with the variables that srun sets, sends the signals,
and has a ``scontrol`` on PATH that writes down what it is asked.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fulmen_checkpoint import TorchCheckpointIO

SCRIPT = Path(__file__).with_name("preemption_script.py")


@dataclass
class Job:
    """A job of SLURM, through its lives."""

    folder: Path
    ranks: int = 2
    array: bool = False
    pids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.folder / "root"
        self.root.mkdir()
        scontrol = self.folder / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/calls\n')
        scontrol.chmod(0o755)
        with socket.socket() as free:  # SLURM's job id decides the port
            port = 0
            while not 15000 <= port < 25000:
                port = port + 1 if port else 15000 + os.getpid() % 9000
                try:
                    free.bind(("127.0.0.1", port))
                except OSError:
                    continue
                break
        self.id = port - 15000 + 70000

    def run(self, during: Any = None, **options: Any) -> list[int]:
        """One life. Returns the exit codes of its tasks."""
        for rank in range(self.ranks):
            (self.root / f"rank{rank}").unlink(missing_ok=True)
        tasks = []
        for rank in range(self.ranks):
            variables = {
                "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
                "SLURM_JOB_ID": self.id,
                "SLURM_JOB_NAME": "train",
                "SLURM_NTASKS": self.ranks,
                "SLURM_NTASKS_PER_NODE": self.ranks,
                "SLURM_NNODES": 1,
                "SLURM_NODELIST": "localhost",
                "SLURM_PROCID": rank,
                "SLURM_LOCALID": rank,
                "SLURM_NODEID": 0,
                "OMP_NUM_THREADS": 1,
            }
            if self.array:
                variables |= {"SLURM_ARRAY_JOB_ID": self.id - 2, "SLURM_ARRAY_TASK_ID": 2}
            command = [
                sys.executable,
                str(SCRIPT),
                json.dumps({"root": str(self.root), "ranks": self.ranks, **options}),
            ]
            environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            tasks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            if during is not None:
                during(tasks)
            errors = [task.communicate(timeout=120)[1] for task in tasks]
        finally:
            for task in tasks:
                task.kill()
        codes = [task.returncode for task in tasks]
        assert set(codes) <= {0, 75, 143}, "\n".join(errors)[-3000:]
        return codes

    @property
    def ends(self) -> set[str]:
        """What each rank saw at its end, and at which step; one entry if they agree."""
        return {self.rank(rank)[-1] for rank in range(self.ranks)}

    def rank(self, rank: int) -> list[str]:
        path = self.root / f"rank{rank}"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


def launched(root: Path, **options: Any) -> int:
    """A run whose ranks fulmen's own launcher starts. Returns its exit code."""
    root.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), json.dumps({"root": str(root), **options})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode in (0, 75, 143), done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the run that nobody ends."""
    root = tmp_path_factory.mktemp("unbroken")
    assert launched(root) == 0
    return (root / "digest").read_text()


def step_of(end: str) -> int:
    return int(end.split()[1])


@pytest.mark.proves("4.44", "4.45", "5.29", "6.8")
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_job_preempted_again_and_again_ends_like_one_that_never_was(unbroken: str, tmp_path: Path) -> None:
    job = Job(tmp_path, array=True)

    # Life 1: one task alone is told, while the other is far behind, or ahead.
    assert job.run(asked=[1], at=4, pause_s=[0.02, 0.0]) == [75, 75]
    (end,) = job.ends
    assert end.startswith("PreemptedException")
    first = step_of(end)
    assert 4 < first <= 10, "at the next row of the loggers that all can still reach"

    # Life 2: every task is told, from outside, at whatever moment it is.
    def announce(tasks: list[subprocess.Popen[str]]) -> None:
        deadline = time.monotonic() + 60
        while not all(job.rank(rank) for rank in range(2)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
            task.send_signal(signal.SIGTERM)  # bypassed

    assert job.run(announce, seed=99, workers=2, pause_s=[0.03]) == [75, 75]
    (end,) = job.ends
    assert [line for line in job.rank(0) if line.startswith("started")] == [f"started {first}"]
    assert first < step_of(end) < 40

    # Life 3: nobody is told anything.
    assert job.run(seed=98) == [0, 0]
    assert job.ends == {"end 40"}
    assert (job.root / "digest").read_text() == unbroken
    assert job.calls == [f"requeue {job.id - 2}_2"] * 2, "one request in each life that was ended"
    assert (job.root / "finalized").read_text().split() == ["finished", "finished", "success"]
    assert sorted(path.name for path in job.root.glob("*.ckpt*")) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"]
    for path in job.root.glob("*.ckpt"):
        TorchCheckpointIO().verify_checkpoint(str(path))


@pytest.mark.slow
@pytest.mark.proves("4.44")
@pytest.mark.timeout(300)
def test_four_ranks_stop_at_the_same_step_when_two_of_them_are_told(tmp_path: Path) -> None:
    job = Job(tmp_path, ranks=4)
    assert job.run(asked=[1, 3], at=2, pause_s=[0.0, 0.01, 0.0, 0.02]) == [75] * 4
    (end,) = job.ends
    path = job.root / "hpc_ckpt_1.ckpt"
    TorchCheckpointIO().verify_checkpoint(str(path))
    assert torch.load(path, weights_only=True)["global_step"] == step_of(end)
    assert job.calls == [f"requeue {job.id}"]


@pytest.mark.proves("6.8", "9.51")
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_ranks_that_sigterm_ends_leave_a_checkpoint_that_goes_on_bit_for_bit(unbroken: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert launched(root, asked=[1], at=5, signal="SIGTERM", on_exception=True, pause_s=[0.0, 0.01]) == 143
    ends = {(root / f"rank{rank}").read_text().splitlines()[-1] for rank in range(2)}
    (end,) = ends
    assert end.startswith("SIGTERMException")
    saved = root / "on_exception.ckpt"
    TorchCheckpointIO().verify_checkpoint(str(saved))
    assert torch.load(saved, weights_only=True)["global_step"] == step_of(end)
    assert (root / "finalized").read_text().split() == ["failed"]

    again = tmp_path / "again"
    assert launched(again, seed=99, ckpt_path=str(saved)) == 0
    assert (again / "digest").read_text() == unbroken


@pytest.mark.timeout(300)
def test_a_time_limit_ends_all_ranks_at_the_same_step_with_a_checkpoint_and_exit_code_0(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert launched(root, max_time={"seconds": 1}, pause_s=[0.0, 0.02]) == 0
    (end,) = {(root / f"rank{rank}").read_text().splitlines()[-1] for rank in range(2)}
    saved = root / "last.ckpt"
    TorchCheckpointIO().verify_checkpoint(str(saved))
    assert end == f"end {torch.load(saved, weights_only=True)['global_step']}"
    assert (root / "finalized").read_text().split() == ["success"]
