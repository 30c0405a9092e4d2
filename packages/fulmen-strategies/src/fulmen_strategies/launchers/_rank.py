"""The life of a process that a launcher of ours has started: it reports its end, and does not outlive its starter."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from fulmen_protocols import read_positions
from fulmen_strategies._marks import LAUNCHED, NOTES, STARTER_IS_NO_RANK, Starter, process_exists
from fulmen_strategies.environments._table import is_launched
from fulmen_strategies.launchers._elastic import ElasticRank, is_elastic
from fulmen_strategies.launchers._failure import is_consequence, read_stack, tell
from fulmen_strategies.launchers._other_hosts import tell_other_hosts
from fulmen_strategies.launchers._own_end import OwnEnd
from fulmen_strategies.launchers._pulse import Pulse

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["MAIN", "become_rank", "report_exit_first"]

MAIN = "main"
"""Whose stack it is, in the folder of notes, when the launcher's own process crashes."""

_POLL_S = 0.2
_lock = threading.Lock()
_rank: _Rank | ElasticRank | None = None


def become_rank() -> None:
    """In a process of several: report how it ends to the one that has started it, and end when that one does.

    That is a launcher of ours, or an elastic agent: torchrun's, or that of ``fulmen run``. Under an agent a process
    also ends when another one of its node has failed.

    Once per process; later calls do nothing, and neither does any in another process.
    """
    global _rank
    if LAUNCHED in os.environ and not is_launched(os.environ, os.getppid(), process_exists):
        return  # the variable was inherited from a process of another run
    if not is_elastic() and LAUNCHED not in os.environ:
        return
    with _lock:
        if _rank is None:
            _rank = ElasticRank() if is_elastic() else _Rank(Starter(int(os.environ[LAUNCHED])))


def report_exit_first() -> None:
    """Call this after registering what is done at exit: a ``sys.exit`` must be reported before connections close."""
    if _rank is not None and _rank.end is not None:
        atexit.unregister(_rank.end.record_exit)
        atexit.register(_rank.end.record_exit)


class _Rank:
    """A process of the local launcher or of the process launcher."""

    def __init__(self, starter: Starter) -> None:
        self._starter = starter
        self._hook_before = sys.excepthook
        self._announcing = threading.Lock()
        self._notes = os.environ.get(NOTES, "")
        if self._notes:
            Pulse(self._notes, int(os.environ.get("RANK", "0"))).start()
        file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        self.end = OwnEnd(file) if file else None
        if self.end is not None:
            sys.excepthook = self._on_uncaught
        threading.Thread(target=self._watch_starter, name="fulmen-starter-watch", daemon=True).start()

    def _watch_starter(self) -> None:
        # The kernel's parent-death signal would be quicker, but it ends a process without a word, and somebody has to
        # say on the terminal what happened to rank 0.
        while not self._starter.is_gone():
            time.sleep(_POLL_S)
        self._announce_and_exit()

    def _announce_and_exit(self) -> None:
        self._announcing.acquire()  # never released: one of the two threads that may come here ends the process
        if os.environ.get(STARTER_IS_NO_RANK) == "1":
            if os.environ.get("LOCAL_RANK") == "0":
                tell(self._starter.last_words())
        elif os.environ.get("LOCAL_RANK") == "1":
            world_size = os.environ.get("WORLD_SIZE", "?")
            rank = int(os.environ.get("RANK", "1")) - 1
            position = read_positions(self._notes).get(rank) if self._notes else None
            where = "" if position is None else f", at {position}"
            crash = read_stack(os.path.join(self._notes, MAIN)) if self._notes else ""
            end = crash or (
                "was killed or called os._exit, and left no Python traceback. "
                "A kill that nobody sent comes from the kernel when memory runs out."
            )
            report = (
                f"rank {rank} of {world_size} (process {self._starter.pid}) ended first{where}; the run was ended. "
                "What is known of it:\n" + "".join(f"[rank{rank}]: {line}\n" for line in end.splitlines())
            )
            tell_other_hosts(report)
            tell(report)
        os._exit(1)

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Leave the traceback to the starter, who prints the one that matters last instead of all of them mixed."""
        if self.end is None or not self.end.is_of_this_process:
            self._hook_before(kind, error, trace)
            return
        if not self._starter.is_gone():
            self.end.record(error)
        if is_consequence(error):
            # A killed process loses its connections a moment before it loses its children.
            until = time.monotonic() + 0.5
            while not self._starter.is_gone() and time.monotonic() < until:
                time.sleep(0.02)
            if self._starter.is_gone():
                self._announce_and_exit()
        elif self._starter.is_gone():
            self._hook_before(kind, error, trace)
