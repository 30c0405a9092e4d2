"""``fulmen doctor`` with real processes: started by itself, torchrun and ``fulmen run``; and one that never comes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.processes

DOCTOR = ["-m", "fulmen_fabric.doctor", "--accelerator", "cpu"]
STARTERS = {
    "fulmen doctor": ["-c", "from fulmen_protocols.cli import main; raise SystemExit(main())", "doctor", *DOCTOR[2:]],
    "python -m": DOCTOR,
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *DOCTOR],
    "fulmen run": [
        "-c", "from fulmen_protocols.cli import main; raise SystemExit(main())", "run", "--devices", "2",
        "--accelerator", "cpu", *DOCTOR[:2],
    ],
}  # fmt: skip
_ALONE = ("LOCAL_RANK", "RANK", "WORLD_SIZE")


def doctor(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in _ALONE}
    return subprocess.run(
        [sys.executable, *words],
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "starter",
    [
        "fulmen doctor",
        "torchrun",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("python -m", "fulmen run")),
    ],
)
def test_two_ranks_that_meet_and_add_up_right_are_well(starter: str) -> None:
    own = starter in ("fulmen doctor", "python -m")
    done = doctor([*STARTERS[starter], *(["--devices", "2"] if own else [])])

    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: node 0, local rank {rank}, cpu of {socket.gethostname()}, process " in done.stdout
    assert "a sum over 2 ranks of one number is right" in done.stdout
    assert "all is well, after " in done.stdout.splitlines()[-1]


def test_one_process_has_nobody_to_meet() -> None:
    done = doctor([*DOCTOR, "--devices", "1"])

    assert done.returncode == 0, done.stderr
    assert "one process: cpu works, and there is nobody to meet" in done.stdout


def test_where_a_rank_never_comes_the_others_say_what_they_wait_for_when_the_time_is_up() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    torchrun = {"LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    began = time.monotonic()
    done = doctor([*DOCTOR, "--devices", "1", "--num-nodes", "2", "--time-limit", "12"], **started, **torchrun)

    assert done.returncode == 1
    assert time.monotonic() - began < 60, "not the ten minutes for which processes wait for each other"
    assert "after 12 s this process is still here: rank 0 of 2, starting and meeting the others at 127.0.0.1" in (
        done.stderr
    )


def test_what_the_starter_says_and_what_is_asked_for_are_compared() -> None:
    torchrun = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x",
    }  # fmt: skip
    done = doctor([*DOCTOR, "--devices", "4"], **torchrun)

    assert done.returncode == 2
    assert "4" in done.stderr
    assert "2" in done.stderr
    assert "rank 0:" not in done.stdout
