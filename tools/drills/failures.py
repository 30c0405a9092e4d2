"""Four real ranks, one of which fails in one of thirteen ways: whose fault it was must be the last thing printed."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.drills.drill import Attempts, Drill, evenly
from tools.drills.load import Reading, read, taken_by_others_s
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
    "hang in a callback": ("in fail", 8),
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
        before = _children_cpu_s()
        process = subprocess.Popen(
            [sys.executable, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        at_failure: list[Reading] = []
        watch = threading.Thread(target=_read_at_failure, args=(folder, process, at_failure), daemon=True)
        watch.start()
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            kill(folder)
            process.kill()
            process.communicate()
            return "did not end", 0.0
        ended_at = time.time()
        watch.join()
        failed_at = folder / "failed-at"
        if not failed_at.exists() or not at_failure:
            return f"the fault did not happen: {output[-2000:]}", 0.0
        at_end = Reading(read(process.pid).all, _children_cpu_s() - before)
        # The promise is about a machine that is free for it.
        lost_s = taken_by_others_s(at_failure[0], at_end)
        seconds = ended_at - float(failed_at.read_text())
        if os.environ.get("FULMEN_DRILL_SHOW"):
            print(f"---- {fault} on rank {culprit}: exit status {process.returncode}, {seconds:.1f} s\n{output}")
        left = alive(folder)
        kill(folder)
    if process.returncode == 0:
        return "exit status 0", seconds
    if left:
        return f"{len(left)} processes were left", seconds
    if seconds > LIMIT_S + stall_s + lost_s:
        return f"took {seconds:.1f} s, {lost_s:.1f} s of which other processes had taken", seconds
    report = last_report(output, culprit, ranks)
    if starter == "torchrun":  # its own table comes last; the report of a rank that survived stands before it
        report = first_report(output, culprit, ranks)
        cause = re.search(r"Root Cause.*?rank +: (\d+)", output, re.DOTALL)
        # It takes for the cause what ends first, and a process that hangs is ended last.
        if not stall_s and (cause is None or int(cause[1]) != culprit):
            return f"torchrun calls another rank the cause: {output[-2000:]}", seconds
    step = "step 8" if fault in ("raise in validation_step", "raise while saving") else "step "
    who = f"rank {culprit} of {ranks} (" if starter != "python" else ""
    missing = [mark for mark in (evidence, step, who) if mark not in report]
    if missing:
        end = "\n".join(output.splitlines()[-20:])
        return f"the last report lacks {', '.join(map(repr, missing))}: {end}", seconds
    return "", seconds


def _read_at_failure(folder: Path, process: subprocess.Popen[str], readings: list[Reading]) -> None:
    """Append what the machine has done when the fault happens; nothing if the run ends without."""
    while process.poll() is None and not readings:
        if (folder / "failed-at").exists():
            readings.append(read(process.pid))
        time.sleep(0.05)


def _children_cpu_s() -> float:
    """CPU time of the processes that this one has waited for, and of those that they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def last_report(output: str, culprit: int, ranks: int) -> str:
    """The lines of the culprit with which the output ends, and the one that introduces them; "" if others follow."""
    lines = output.strip().splitlines()
    start = len(lines)
    while start and lines[start - 1].startswith(f"[rank{culprit}]: "):
        start -= 1
    if start and lines[start - 1].startswith(f"rank {culprit} of {ranks} "):
        start -= 1
    return "\n".join(lines[start:])


def first_report(output: str, culprit: int, ranks: int) -> str:
    """The first line that begins with the culprit's name, and the lines of that rank after it; "" if there is none."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"rank {culprit} of {ranks} (")), len(lines))
    end = start + 1
    while end < len(lines) and lines[end].startswith(f"[rank{culprit}]: "):
        end += 1
    return "\n".join(lines[start:end])


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
