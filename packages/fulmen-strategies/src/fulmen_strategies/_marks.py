"""How a process knows that fulmen's own launcher has started it."""

from __future__ import annotations

import os

__all__ = ["LAUNCHED", "NOTES", "STARTER_IS_NO_RANK", "process_exists"]

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
