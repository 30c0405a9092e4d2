"""Four real ranks, one of which fails in one of twelve ways: whose fault it was must be the last thing printed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.drills.drill import Attempts, Drill, evenly
from tools.drills.table import Row

RANKS = 4
LIMIT_S = 10.0
SCRIPT = Path(__file__).with_name("failure_run.py")

STARTERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node={ranks}", "--standalone"],
    "fulmen run": [
        "-c", "from fulmen_protocols.cli import main; raise SystemExit(main())", "run", "--accelerator=cpu",
        "--devices={ranks}",
    ],
}  # fmt: skip
"""What stands before the script for each way of starting it."""

FAULTS: dict[str, tuple[str, float]] = {
    "raise in training_step": ("sample 7 is missing", 0),
    "raise in a backward hook": ("sample 7 is missing", 0),
    "raise in a loader's worker": ("sample 7 is missing", 0),
    "raise in validation_step": ("sample 7 is missing", 0),
    "raise in a callback": ("sample 7 is missing", 0),
    "raise while saving": ("sample 7 is missing", 0),
    "sys.exit(3)": ("exit", 0),
    "os._exit(7)": ("exit", 0),
    "SIGKILL": ("kill", 0),
    "SIGSEGV": ("Segmentation fault", 0),
    "hang in Python": ("in fail", 8),
    "one collective skipped": ("collective", 8),
}
"""Name: what the report must hold besides rank and step, and the stall limit that the run was given, in seconds."""


def attempts(fault: str, first: int, count: int) -> Row:
    """Let rank 1, 0, 2 and 3 fail, in turn."""
    row = Row("failures", fault, count, 0, {"ended in time, culprit and step named last": 0})
    for index in range(first, first + count):
        culprit = (1, 0, 2, 3)[index % RANKS]
        wrong, seconds = judge(fault, culprit)
        row.wrong += bool(wrong)
        note = f"rank {culprit}: {wrong}" if wrong else "ended in time, culprit and step named last"
        row.notes[note] = row.notes.get(note, 0) + 1
        if not wrong:
            within = f"gone within {math.ceil(seconds)} s"
            row.notes[within] = row.notes.get(within, 0) + 1
    return row


def judge(fault: str, culprit: int, *, ranks: int = RANKS, starter: str = "python") -> tuple[str, float]:
    """Run once; return what went wrong, or "", and how many seconds after the fault all processes were gone.

    Args:
        fault: one of ``FAULTS``.
        culprit: which rank fails.
        ranks: how many there are.
        starter: a key of ``STARTERS``.
    """
    evidence, stall_s = FAULTS[fault]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = [word.format(ranks=ranks) for word in STARTERS[starter]]
        arguments = [*launcher, str(SCRIPT), fault, str(culprit), str(ranks), name]
        dropped = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
        env = {key: value for key, value in os.environ.items() if key not in dropped} | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [sys.executable, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, timeout=600, check=False, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            kill(folder)
            return "did not end", 0.0
        failed_at = folder / "failed-at"
        if not failed_at.exists():
            return f"the fault did not happen: {done.stdout[-2000:]}", 0.0
        seconds = time.time() - float(failed_at.read_text())
        if os.environ.get("FULMEN_DRILL_SHOW"):
            print(f"---- {fault} on rank {culprit}: exit status {done.returncode}, {seconds:.1f} s\n{done.stdout}")
        left = alive(folder)
        kill(folder)
    if done.returncode == 0:
        return "exit status 0", seconds
    if left:
        return f"{len(left)} processes were left", seconds
    if seconds > LIMIT_S + stall_s:
        return f"took {seconds:.1f} s", seconds
    # torchrun's own summary comes last; the report of a rank that survived stands before it.
    report = done.stdout if starter == "torchrun" else last_report(done.stdout, culprit, ranks)
    step = "step 8" if fault in ("raise in validation_step", "raise while saving") else "step "
    who = f"rank {culprit} of {ranks} (" if starter != "python" else ""
    missing = [mark for mark in (evidence, step, who) if mark not in report]
    if missing:
        end = "\n".join(done.stdout.splitlines()[-20:])
        return f"the last report lacks {', '.join(map(repr, missing))}: {end}", seconds
    return "", seconds


def last_report(output: str, culprit: int, ranks: int) -> str:
    """The lines of the culprit with which the output ends, and the one that introduces them; "" if others follow."""
    lines = output.strip().splitlines()
    start = len(lines)
    while start and lines[start - 1].startswith(f"[rank{culprit}]: "):
        start -= 1
    if start and lines[start - 1].startswith(f"rank {culprit} of {ranks} "):
        start -= 1
    return "\n".join(lines[start:])


def alive(folder: Path) -> list[int]:
    """The ranks' processes that still run; a zombie does not."""
    found: list[int] = []
    for file in folder.glob("pid-*"):
        state = Path(f"/proc/{file.read_text()}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[-1].split()[0] != "Z":
            found.append(int(file.read_text()))
    return found


def kill(folder: Path) -> None:
    """End what is left."""
    for pid in alive(folder):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def _nothing() -> Iterator[Attempts]:
    yield attempts


FAILURES = Drill(_nothing, lambda count: evenly(list(FAULTS), count), piece=1, short=3, full=48)
