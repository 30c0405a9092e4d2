"""The life of a process that the launcher has started: it reports its end, and does not outlive its starter."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from fulmen_strategies._marks import LAUNCHED, STARTER_IS_NO_RANK, process_exists
from fulmen_strategies.environments._table import is_launched
from fulmen_strategies.launchers._failure import is_consequence, record_exception, stack_file

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["become_rank"]

_POLL_S = 0.2
_lock = threading.Lock()
_rank: _Rank | None = None


def become_rank() -> None:
    """In a process that the launcher has started: report uncaught exceptions to the starter and end when it ends.

    Once per process; later calls do nothing, and neither does any in another process.
    """
    global _rank
    if LAUNCHED not in os.environ or not is_launched(os.environ, os.getppid(), process_exists):
        return
    with _lock:
        if _rank is None:
            _rank = _Rank(starter=int(os.environ[LAUNCHED]))


class _Rank:
    def __init__(self, starter: int) -> None:
        self._starter = starter
        self._is_child = os.getppid() == starter
        self._pid = os.getpid()
        self._file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        self._hook_before = sys.excepthook
        self._announcing = threading.Lock()
        if self._file:
            sys.excepthook = self._on_uncaught
            if not faulthandler.is_enabled():
                # Kept open on purpose: the handler writes to it when the process crashes.
                self._stack = open(stack_file(self._file), "w", encoding="utf-8")  # noqa: SIM115
                faulthandler.enable(self._stack)
        threading.Thread(target=self._watch_starter, name="fulmen-starter-watch", daemon=True).start()

    def _starter_is_gone(self) -> bool:
        return os.getppid() != self._starter if self._is_child else not process_exists(self._starter)

    def _watch_starter(self) -> None:
        # The kernel's parent-death signal would be quicker, but it ends a process without a word, and somebody has to
        # say on the terminal what happened to rank 0.
        while not self._starter_is_gone():
            time.sleep(_POLL_S)
        self._announce_and_exit()

    def _announce_and_exit(self) -> None:
        self._announcing.acquire()  # never released: one of the two threads that may come here ends the process
        if os.environ.get(STARTER_IS_NO_RANK) == "1":
            if os.environ.get("LOCAL_RANK") == "0":
                os.write(
                    2, f"process {self._starter}, which had started the ranks, has ended; they end too.\n".encode()
                )
        elif os.environ.get("LOCAL_RANK") == "1":
            world_size = os.environ.get("WORLD_SIZE", "?")
            rank = int(os.environ.get("RANK", "1")) - 1
            report = (
                f"rank {rank} of {world_size} (process {self._starter}) ended first; the run was ended. "
                "What is known of it:\n"
                f"[rank{rank}]: was killed or called os._exit, and left no Python traceback. "
                "A kill that nobody sent comes from the kernel when memory runs out.\n"
            )
            os.write(2, report.encode())
        os._exit(1)

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Leave the traceback to the starter, who prints the one that matters last instead of all of them mixed."""
        if os.getpid() != self._pid:  # a fork of this process
            self._hook_before(kind, error, trace)
            return
        if is_consequence(error):
            # A killed process loses its connections a moment before it loses its children.
            until = time.monotonic() + 1.0
            while not self._starter_is_gone() and time.monotonic() < until:
                time.sleep(0.02)
        if not self._starter_is_gone():
            record_exception(self._file, error)
        elif is_consequence(error):
            self._announce_and_exit()
        else:
            self._hook_before(kind, error, trace)
