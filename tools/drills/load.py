"""How much of the machine other processes take while a drill runs: what is promised in seconds allows for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Reading", "read", "taken_by_others_s"]

_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL = 0, 1, 2, 5, 6, 7
"""Columns of the first line of /proc/stat that are time in which a core was not free (proc_stat(5))."""


class Reading(NamedTuple):
    """Seconds of CPU time since some moment in the past.

    Attributes:
        all: of all processes on all cores, and what the host of a virtual machine kept for itself.
        ours: of the processes of one session that are there.
    """

    all: float
    ours: float


def read(session: int) -> Reading:
    """What Linux knows now; zeros elsewhere."""
    tick = float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 1.0
    columns = [0] * 10
    with contextlib.suppress(OSError):
        columns = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(columns[i] for i in (_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL))
    return Reading(busy / tick, sum(_cpu_ticks(file, session) for file in Path("/proc").glob("[0-9]*/stat")) / tick)


def taken_by_others_s(before: Reading, after: Reading) -> float:
    """How long the others have kept all cores busy between two readings, in seconds.

    Args:
        before: the first one.
        after: the second; ``ours`` must count the processes that have ended meanwhile too.
    """
    others = (after.all - before.all) - (after.ours - before.ours)
    return max(0.0, others) / (os.cpu_count() or 1)


def _cpu_ticks(file: Path, session: int) -> int:
    try:
        fields = file.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0
    # proc_pid_stat(5): session is field 6; user and system time 14 and 15, of children that were waited for 16 and 17.
    return sum(map(int, fields[11:15])) if int(fields[3]) == session else 0
