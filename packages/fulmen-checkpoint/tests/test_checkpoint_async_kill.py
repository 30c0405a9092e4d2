"""The training process or the writing one is killed at any instant: the old checkpoint or the new one is there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fulmen_checkpoint import AsyncCheckpointIO, TorchCheckpointIO, find_last
from fulmen_checkpoint.names import is_staging
from fulmen_protocols import CheckpointError

pytestmark = [pytest.mark.proves("5.13"), pytest.mark.processes]

# For each line "n" forks a child that saves over and over, prunes the one before, and prints each number once that save
# has returned. Its writer's id comes first.
_SAVER = """
import os, sys, torch
from fulmen_checkpoint import AsyncCheckpointIO
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid:
        print("child", pid, flush=True)
        os.waitpid(pid, 0)
        print("end", flush=True)
        continue
    io, n = AsyncCheckpointIO(), int(line)
    ws = [torch.zeros(300, 1000) for _ in range(4)]
    while True:
        n += 1
        for w in ws:
            w.fill_(n)
        io.save_checkpoint({"n": n, "ws": ws}, f"{sys.argv[1]}/{n}.ckpt")
        io.remove_checkpoint(f"{sys.argv[1]}/{n - 1}.ckpt")
        for w in ws:
            w.fill_(-1)
        os.write(1, b"writer %d\\n" % (io._process.pid or 0))
"""


def _shared() -> list[str]:
    """What is in shared memory, but for the semaphores of other processes' multiprocessing."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-"))


def _wait_for_end(pid: int) -> None:
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.02)
    pytest.fail(f"the writer {pid} outlives its trainer")


def _kill_many(folder: Path, times: int) -> int:
    """Kills ``times`` trainers one after the other; returns how often half a file was there at that moment."""
    rng, io, newest, cut = random.Random(0), TorchCheckpointIO(), 0, 0
    shared = _shared()
    saver = subprocess.Popen(
        [sys.executable, "-c", _SAVER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        assert saver.stdout.readline() == "ready\n"
        for _ in range(times):
            saver.stdin.write(f"{newest}\n")
            saver.stdin.flush()
            told = [saver.stdout.readline() for _ in range(4)]
            time.sleep(rng.uniform(0, 0.1))
            os.kill(int(next(line for line in told if line.startswith("child")).split()[1]), signal.SIGKILL)
            cut += any(is_staging(name) for name in os.listdir(folder))
            while told[-1] != "end\n":
                told.append(saver.stdout.readline())
                assert told[-1], "the saver died"
            for writer in {int(line.split()[1]) for line in told if line.startswith("writer")} - {0}:
                _wait_for_end(writer)
            found = find_last(folder)
            assert found.path is not None
            assert found.skipped == ()
            checkpoint = io.load_checkpoint(found.path)
            assert isinstance(checkpoint["n"], int)
            assert checkpoint["n"] >= newest, "what was there before is gone"
            newest = checkpoint["n"]
            assert all(torch.equal(w, torch.full((300, 1000), float(newest))) for w in checkpoint["ws"])
            for name in os.listdir(folder):
                if not is_staging(name):
                    io.verify_checkpoint(folder / name)
        saver.stdin.close()
    assert _shared() == shared
    return cut


def test_killing_the_trainer_at_any_instant_leaves_whole_checkpoints_and_no_process(tmp_path: Path) -> None:
    # Without kills in the middle of a file the test would prove nothing.
    assert _kill_many(tmp_path, 15) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_kills_of_the_trainer_leave_whole_checkpoints(tmp_path: Path) -> None:
    assert _kill_many(tmp_path, 500) > 50


def test_killing_the_writer_at_any_instant_loses_no_checkpoint(tmp_path: Path) -> None:
    io, rng, killed = AsyncCheckpointIO(max_pending=0), random.Random(0), set[int]()
    ws = [torch.zeros(300, 1000) for _ in range(4)]
    for n in range(12):
        for w in ws:
            w.fill_(n)
        io.save_checkpoint({"n": n, "ws": ws}, tmp_path / "a.ckpt")
        time.sleep(rng.uniform(0, 0.05))
        writer = io._process.pid
        if writer is not None and writer not in killed:
            killed.add(writer)
            os.kill(writer, signal.SIGKILL)
        io.wait()
        found = TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
        assert found["n"] == n
        assert all(torch.equal(w, torch.full((300, 1000), float(n))) for w in found["ws"])
    assert len(killed) > 1
    io.teardown()
    assert os.listdir(tmp_path) == ["a.ckpt"], "a killed writer's half file is still there"


def test_a_writer_that_is_killed_again_and_again_is_an_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    io.save_checkpoint({"n": 0}, tmp_path / "a.ckpt")
    io.wait()
    big = torch.ones(20_000_000)
    io.save_checkpoint({"n": 1, "w": big}, tmp_path / "a.ckpt")
    error = None
    killed = set[int]()
    while error is None and len(killed) < 5:
        writer = io._process.pid
        if writer is not None and writer not in killed:
            killed.add(writer)
            os.kill(writer, signal.SIGKILL)
        try:
            io.poll()
        except CheckpointError as raised:
            error = raised
    assert error is not None
    assert "a.ckpt' was not written: the writing process ended 3 times" in str(error)
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == {"n": 0}
    io.save_checkpoint({"n": 2}, tmp_path / "a.ckpt")
    io.teardown()
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == {"n": 2}


def test_signals_to_the_whole_job_do_not_reach_what_is_being_written(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    io.save_checkpoint({"n": 0}, tmp_path / "a.ckpt")
    io.wait()
    writer = io._process.pid
    assert writer is not None
    assert os.getpgid(writer) != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(writer, number)
    io.save_checkpoint({"n": 1}, tmp_path / "a.ckpt")
    io.wait()
    assert io._process.pid == writer
    io.teardown()
