"""A process killed at any instant of a save leaves the old checkpoint or the new one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

from fulmen_checkpoint import TorchCheckpointIO, find_last
from fulmen_checkpoint.names import is_staging

if TYPE_CHECKING:
    from pathlib import Path

# For each line "n" forks a child that saves over and over and prints each number once that save is complete.
_SAVER = """
import os, sys, torch
from fulmen_checkpoint import TorchCheckpointIO
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid:
        print("child", pid, flush=True)
        os.waitpid(pid, 0)
        print("end", flush=True)
        continue
    io, n = TorchCheckpointIO(), int(line)
    while True:
        n += 1
        io.save_checkpoint({"n": n, "ws": [torch.full((300, 1000), float(n)) for _ in range(4)]}, sys.argv[1])
        os.write(1, b"%d\\n" % n)
"""


def _kill_while_saving(saver: subprocess.Popen[str], started_at: int, delay_s: float) -> int:
    """Returns the last save that the process said was complete."""
    assert saver.stdin is not None
    assert saver.stdout is not None
    saver.stdin.write(f"{started_at}\n")
    saver.stdin.flush()
    told = [saver.stdout.readline()]
    if started_at == 0:
        told.append(saver.stdout.readline())
    time.sleep(delay_s)
    os.kill(int(next(line for line in told if line.startswith("child")).split()[1]), signal.SIGKILL)
    while told[-1] != "end\n":
        told.append(saver.stdout.readline())
        assert told[-1], "the saver died"
    return max([started_at, *(int(line) for line in told if line[0].isdigit())])


def _kill_many(path: Path, times: int) -> int:
    """Kills ``times`` savers one after the other; returns how many left half a file behind."""
    rng, io, newest, cut = random.Random(0), TorchCheckpointIO(), 0, 0
    saver = subprocess.Popen(
        [sys.executable, "-c", _SAVER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "ready\n"
        for _ in range(times):
            complete = _kill_while_saving(saver, newest, rng.uniform(0, 0.08))
            cut += any(is_staging(name) for name in os.listdir(path.parent))
            found = io.load_checkpoint(path)
            newest = found["n"]
            assert isinstance(newest, int)
            # All that was said to be complete is there, and at most the save after it.
            assert newest in (complete, complete + 1)
            assert all(torch.equal(w, torch.full((300, 1000), float(newest))) for w in found["ws"])
            assert find_last(path.parent).path == str(path)
        assert saver.stdin is not None
        saver.stdin.close()
    io.save_checkpoint({"n": -1}, path)
    assert os.listdir(path.parent) == [path.name]
    return cut


@pytest.mark.proves("5.11")
def test_a_kill_at_any_instant_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    # Without kills in the middle of a file the test would prove nothing.
    assert _kill_many(tmp_path / "last.ckpt", 40) > 0


@pytest.mark.proves("5.11")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_kills_leave_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    assert _kill_many(tmp_path / "last.ckpt", 500) > 50
