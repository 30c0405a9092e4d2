"""How a process knows who has started it, and whether that one still lives."""

from __future__ import annotations

import os

__all__ = ["LAUNCHED", "NOTES", "STARTER_IS_NO_RANK", "Starter", "process_exists"]

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
