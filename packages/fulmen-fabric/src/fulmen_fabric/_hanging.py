"""Ranks that hang when another one has failed: ended within seconds; torch's agent would wait for half a minute."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

__all__ = ["end_hanging_children", "has_children"]

_LOOK_S = 0.2
_TERM_S = 5.0
_ENDED_BY_SIGTERM = (signal.SIGTERM, 128 + signal.SIGTERM)


@functools.cache
def end_hanging_children() -> None:
    """From now on kill the other children of this process 5 s after one of them has failed. Once for a process.

    The agent sends them SIGTERM, which a rank that hangs in a collective does not heed. A rank that ends by SIGTERM is
    no failure: the others may still be saving. Works on Linux, where a process can name its children.
    """
    if sys.platform == "linux":
        threading.Thread(target=_look, name="fulmen-children", daemon=True).start()


def has_children() -> bool:
    """Whether this process has any; True where it cannot tell."""
    return sys.platform != "linux" or bool(_children())


def _look() -> None:
    known: set[int] = set()
    while True:
        new = _children() - known
        known |= new
        for pid in new:
            threading.Thread(target=_wait_for, args=(pid, known), daemon=True).start()
        time.sleep(_LOOK_S)


def _children() -> set[int]:
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(map(int, file.read_text().split()))
    return found


def _wait_for(pid: int, known: set[int]) -> None:
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # leaves the child to the agent
    except ChildProcessError:
        return  # the agent was quicker; it sees the next failure
    if ended is None or ended.si_status == 0 or ended.si_status in _ENDED_BY_SIGTERM:
        return
    siblings = frozenset(known)
    time.sleep(_TERM_S)
    for other in siblings & _children():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # A rank leads a group of its own, with its data loading workers.
            if os.getpgid(other) == other:
                os.killpg(other, signal.SIGKILL)
