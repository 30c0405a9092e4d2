"""How a process knows that fulmen's own launcher has started it."""

from __future__ import annotations

import os

__all__ = ["LAUNCHED", "NOTES", "process_exists"]

LAUNCHED = "FULMEN_LAUNCHED"
"""Set in the processes that the launcher starts: the id of the process that started them."""

NOTES = "FULMEN_NOTES"
"""Set there too: the folder in which the ranks of this machine write down where they are."""


def process_exists(pid: int) -> bool:
    """Whether some process has the id ``pid``."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True
