"""A real SLURM of one node, and real MPI. ``nox -s clusters`` installs both and runs this."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parent
NODES = ["sinfo", "-h", "-o", "%T"]


def slurm_is_up() -> bool:
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return False
    found = subprocess.run(NODES, capture_output=True, text=True, timeout=20, check=False).stdout
    return "idle" in found or "mixed" in found or "allocated" in found


needs_slurm = pytest.mark.skipif(
    not slurm_is_up(), reason="there is no SLURM with a node that is up; nox -s clusters makes one"
)
needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None or find_spec("mpi4py") is None,
    reason="mpirun and mpi4py are not both installed; nox -s clusters does that",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"{what} has not come within {seconds:.0f} s"
        time.sleep(0.2)
    return found


class Job:
    """A batch script in SLURM's queue."""

    def __init__(self, folder: Path, command: str, *options: str) -> None:
        self.output = folder / "output"
        lines = ["#!/bin/bash", *(f"#SBATCH {one}" for one in ("--nodes=1", f"--output={self.output}", *options))]
        (folder / "job.sh").write_text("\n".join([*lines, "export OMP_NUM_THREADS=1", command, ""]))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        done = subprocess.run(
            ["sbatch", "--parsable", str(folder / "job.sh")], capture_output=True, text=True, check=True, env=kept
        )
        self.number = done.stdout.strip()

    def field(self, name: str) -> str:
        done = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True)
        return next(word.partition("=")[2] for word in done.stdout.split() if word.startswith(f"{name}="))

    def finish(self, seconds: float = 240) -> str:
        """Wait for its end; the exit code."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.field("JobState") in ended, seconds, f"the end of job {self.number}")
        return self.field("ExitCode")

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def srun(script: str, *arguments: object) -> str:
    words = " ".join(f"'{one}'" for one in arguments)
    return f"srun --mpi=none {sys.executable} {FOLDER / script} {words}"


def results(folder: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@needs_slurm
@pytest.mark.proves("4.41")
def test_the_tasks_of_a_job_train_together(tmp_path: Path) -> None:
    job = Job(tmp_path, srun("cluster_script.py", tmp_path, 2), "--ntasks-per-node=2")
    assert job.finish() == "0:0", job.said()
    found = results(tmp_path)
    assert [one["place"] for one in found] == [[0, 0, 0, 2], [1, 1, 0, 2]]
    for one in found:
        assert (one["environment"], one["steps"]) == ("SLURMEnvironment", 4)
        assert one["port"] == 15000 + int(job.number[-4:])
        assert one["weight"] == found[0]["weight"]


@needs_slurm
@pytest.mark.proves("4.41")
def test_a_job_that_is_not_what_the_script_asks_for_fails_with_both_values(tmp_path: Path) -> None:
    job = Job(tmp_path, srun("cluster_script.py", tmp_path, 4), "--ntasks-per-node=2")
    assert job.finish() != "0:0"
    assert "devices=4, but SLURM has started SLURM_NTASKS_PER_NODE=2 processes on this node" in job.said()
    assert "--ntasks-per-node=4" in job.said()
    assert not results(tmp_path)


@needs_slurm
@pytest.mark.proves("4.44", "4.45")
def test_a_job_that_is_about_to_end_is_queued_again_and_goes_on_where_it_was(tmp_path: Path) -> None:
    root = tmp_path / "run"
    options = json.dumps({"root": str(root), "ranks": 2, "pause_s": [0.5]})
    job = Job(tmp_path, srun("preemption_script.py", options), "--ntasks-per-node=2", "--requeue", "--open-mode=append")
    wait_for(lambda: (root / "rank0").exists(), 200, "the start of training")
    time.sleep(4)
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)
    wait_for(lambda: list(root.glob("hpc_ckpt_1.ckpt")), 60, "the checkpoint")
    wait_for(lambda: job.field("Restarts") == "1" and job.field("JobState") == "PENDING", 60, "the requeue")
    # SLURM holds a job that is queued again for two minutes.
    subprocess.run(["scontrol", "update", f"JobId={job.number}", "StartTime=now"], check=True)

    assert job.finish(300) == "0:0", job.said()
    events = (root / "rank0").read_text().split("\n")
    started, stopped, again, ended = [line.split() for line in events if line]
    assert started == ["started", "0"]
    assert stopped[0] == "PreemptedException"
    assert 0 < int(stopped[1]) < 40
    assert again == ["started", stopped[1]]
    assert ended == ["end", "40"]
    assert (root / "finalized").read_text().split() == ["finished", "success"]
    assert (root / "digest").exists()
    assert job.field("Restarts") == "1"


def mpirun(tmp_path: Path, devices: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["mpirun", "-n", "2", *options, sys.executable, str(FOLDER / "cluster_script.py"), str(tmp_path)]
    rights = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    return subprocess.run(
        [*command, str(devices)], capture_output=True, text=True, timeout=280, check=False, env={**kept, **rights}
    )


@needs_mpi
@pytest.mark.proves("4.38", "4.43")
def test_the_processes_of_mpirun_train_together(tmp_path: Path) -> None:
    done = mpirun(tmp_path, 2, "--oversubscribe")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert [one["place"] for one in found] == [[0, 0, 0, 2], [1, 1, 0, 2]]
    for one in found:
        assert (one["environment"], one["address"], one["steps"]) == ("MPIEnvironment", "127.0.0.1", 4)
        assert one["weight"] == found[0]["weight"]
        assert one["port"] == found[0]["port"]


@needs_mpi
@pytest.mark.proves("4.43")
def test_mpis_processes_that_are_not_what_the_script_asks_for_fail_with_both_values(tmp_path: Path) -> None:
    done = mpirun(tmp_path, 3, "--oversubscribe")
    assert done.returncode != 0
    assert "devices=3, but MPI has started 2 processes on this host: set devices=2" in done.stderr
    assert not results(tmp_path)
