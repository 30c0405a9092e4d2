"""How a process knows who has started it, and whether that one still lives."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "LAUNCHED",
    "NOTES",
    "STARTER_IS_NO_RANK",
    "Starter",
    "ended_unseen",
    "exit_code_of",
    "has_ended",
    "process_exists",
]

LAUNCHED = "FULMEN_LAUNCHED"
"""Set in the processes that the launcher starts: the id of the process that started them."""

NOTES = "FULMEN_NOTES"
"""Set there too: the folder in which the ranks of this machine write down where they are."""
STARTER_IS_NO_RANK = "FULMEN_AGENT"
"""Set to 1 where that process only watches: that of ``fulmen run``, or one that has made processes for a function."""


def process_exists(pid: int) -> bool:
    """Whether some process has the id ``pid``."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or has ended and only waits for its parent to take notice."""
    return not process_exists(pid) or ended_unseen(pid)


def ended_unseen(pid: int) -> bool:
    """Whether the process has ended and its parent has not taken notice yet. Linux tells; elsewhere False."""
    fields = _stat(pid)
    return bool(fields) and fields[0] in "ZX"


def exit_code_of(pid: int) -> int | None:
    """As ``Popen.returncode`` has it, of a process that ``ended_unseen``; None if that cannot be told."""
    fields = _stat(pid)
    if not fields or fields[0] not in "ZX":
        return None
    # The last field that every kernel since 3.5 has (proc_pid_stat(5)); 0 where we may not know.
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE])) or None


_EXIT_CODE = 52 - 3  # fields of proc_pid_stat(5) count from 1, and these begin with the third


def _stat(pid: int) -> list[str]:
    """What /proc says of the process, from its state on; empty where there is no such file."""
    try:
        # The name before it, in parentheses, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


class Starter:
    """The process that has started this one.

    Args:
        pid: its id.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._is_parent = os.getppid() == pid

    def is_gone(self) -> bool:
        """Whether it has ended. A parent's id cannot be mistaken for that of a process which came later."""
        return os.getppid() != self.pid if self._is_parent else not process_exists(self.pid)

    def last_words(self) -> str:
        """What one of its processes says when it is gone, and was no rank itself."""
        return f"process {self.pid}, which had started the ranks, has ended; they end too.\n"
