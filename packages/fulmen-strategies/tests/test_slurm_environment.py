"""SLURMEnvironment: what it reads from a task's variables, what it refuses, and how it asks for its job again."""

from __future__ import annotations

import os
import signal
import warnings
from typing import TYPE_CHECKING

import pytest

from fulmen_protocols import MisconfigurationException
from fulmen_strategies import SLURMEnvironment
from fulmen_strategies.environments.slurm import first_host

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables of a task, and removes every other one of SLURM."""

    def set_all(**variables: str) -> None:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_all()
    return set_all


@pytest.mark.proves("4.41")
@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("alpha", "alpha"),
        ("alpha,beta", "alpha"),
        ("alpha beta", "alpha"),
        ("host[1-3,5]", "host1"),
        ("host[5,1-3],other7", "host5"),
        ("host[007-009]", "host007"),
        ("rack[2-3]n[10,12]", "rack2n10"),
        ("gpu[01]-ib0", "gpu01-ib0"),
        ("1.2.3.4", "1.2.3.4"),
    ],
)
def test_the_first_host_of_a_node_list_is_the_meeting_point(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.proves("4.41")
def test_the_port_follows_from_the_job_so_that_jobs_on_one_node_do_not_meet(task: Callable[..., None]) -> None:
    environment = SLURMEnvironment()
    assert (environment.main_address, environment.main_port) == ("127.0.0.1", 12910)
    task(SLURM_JOB_ID="1234567", SLURM_NODELIST="n[4-5]")
    assert (environment.main_address, environment.main_port) == ("n4", 19567)
    task(SLURM_JOB_ID="12", SLURM_NODELIST="n[4-5]", MASTER_ADDR="other", MASTER_PORT="3000")
    assert (environment.main_address, environment.main_port) == ("other", 3000)


@pytest.mark.proves("4.41")
def test_a_prompt_inside_a_job_is_no_task_of_it(task: Callable[..., None]) -> None:
    assert not SLURMEnvironment.detect()
    for name, detected in [("train", True), ("bash", False), ("interactive", False)]:
        task(SLURM_NTASKS="2", SLURM_JOB_ID="1", SLURM_JOB_NAME=name)
        assert SLURMEnvironment.detect() is detected


@pytest.mark.proves("4.41")
def test_a_program_started_without_the_srun_that_is_there_is_told(
    task: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="srun python"):
        assert not SLURMEnvironment.detect()
    task(SLURM_NTASKS="2", SLURM_JOB_ID="1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SLURMEnvironment.detect()


@pytest.mark.proves("4.41")
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, ["SLURM_NTASKS=4", "--ntasks-per-node=2", "--nodes=2"]),
        ({"SLURM_NTASKS_PER_NODE": "4"}, ["devices=2", "SLURM_NTASKS_PER_NODE=4", "set devices=4"]),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}, ["num_nodes=2", "SLURM_NNODES=1", "set num_nodes=1"]),
        (
            {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "3"},
            ["4 processes", "SLURM_NTASKS=3", "LightningEnvironment"],
        ),
        ({"SLURM_NTASKS_PER_NODE": "two"}, ["SLURM_NTASKS_PER_NODE", "'two'", "whole number"]),
    ],
)
def test_settings_that_contradict_the_job_are_refused_with_the_fix(
    variables: dict[str, str], words: list[str], task: Callable[..., None]
) -> None:
    task(**{"SLURM_NTASKS": "4", **variables})
    with pytest.raises(MisconfigurationException) as refused:
        SLURMEnvironment().validate_settings(num_devices=2, num_nodes=2)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.proves("4.41")
def test_requeueing_is_on_and_announced_by_sigusr1_unless_said_otherwise() -> None:
    environment = SLURMEnvironment()
    assert (environment.auto_requeue, environment.requeue_signal) == (True, signal.SIGUSR1)
    environment = SLURMEnvironment(False, signal.SIGHUP)
    assert (environment.auto_requeue, environment.requeue_signal) == (False, signal.SIGHUP)
    for wrong in (signal.SIGKILL, 1000, "SIGUSR1"):
        with pytest.raises(MisconfigurationException) as refused:
            SLURMEnvironment(requeue_signal=wrong)  # type: ignore[arg-type]
        assert f"requeue_signal={wrong!r}" in str(refused.value)
        assert "signal.SIGUSR1" in str(refused.value)


@pytest.mark.proves("4.44")
@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({"SLURM_JOB_ID": "42"}, "42"),
        ({"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}, "40_2"),
    ],
)
def test_scontrol_is_asked_once_for_the_job_or_the_task_of_an_array(
    variables: dict[str, str], job: str, task: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    task(**variables)
    SLURMEnvironment().requeue()
    assert (tmp_path / "calls").read_text() == f"requeue {job}\n"


@pytest.mark.proves("4.44")
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_JOB_ID": "42"}, ["'scontrol requeue 42'", "exit code 127", "Run it by hand"]),
        ({}, ["SLURM_JOB_ID", "''"]),
        ({"SLURM_JOB_ID": "42; rm -rf x"}, ["SLURM_JOB_ID", "'42; rm -rf x'"]),
        ({"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "40"}, ["SLURM_ARRAY_TASK_ID", "'40_'"]),
    ],
)
def test_a_job_that_cannot_be_queued_again_is_an_error_that_says_why(
    variables: dict[str, str],
    words: list[str],
    task: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no scontrol
    task(**variables)
    with pytest.raises(RuntimeError) as failed:
        SLURMEnvironment().requeue()
    assert all(word in str(failed.value) for word in words), failed.value
