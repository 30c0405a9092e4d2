"""The life of a process that the launcher has started: it reports its end, and does not outlive its starter."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from fulmen_protocols import read_positions
from fulmen_strategies._marks import LAUNCHED, NOTES, STARTER_IS_NO_RANK, process_exists
from fulmen_strategies.environments._table import is_launched
from fulmen_strategies.launchers._elastic import ElasticRank, is_elastic
from fulmen_strategies.launchers._failure import (
    exit_of_a_run,
    is_consequence,
    read_stack,
    record_exception,
    stack_file,
)
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
    """In a process that the launcher has started: report uncaught exceptions to the starter and end when it ends.

    In one that torchrun has started: report them to its agent, and end when another rank of the node has failed.

    Once per process; later calls do nothing, and neither does any in another process.
    """
    global _rank
    is_ours = LAUNCHED in os.environ
    if not (is_launched(os.environ, os.getppid(), process_exists) if is_ours else is_elastic()):
        return
    with _lock:
        if _rank is None:
            _rank = _Rank(starter=int(os.environ[LAUNCHED])) if is_ours else ElasticRank()


def report_exit_first() -> None:
    """Call this after registering what is done at exit: a ``sys.exit`` must be reported before connections close."""
    if isinstance(_rank, _Rank):
        atexit.unregister(_rank.at_exit)
        atexit.register(_rank.at_exit)


class _Rank:
    def __init__(self, starter: int) -> None:
        self._starter = starter
        self._is_child = os.getppid() == starter
        self._pid = os.getpid()
        self._file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        self._hook_before = sys.excepthook
        self._announcing = threading.Lock()
        self._notes = os.environ.get(NOTES, "")
        if self._notes:
            Pulse(self._notes, int(os.environ.get("RANK", "0"))).start()
        if self._file:
            sys.excepthook = self._on_uncaught
            atexit.register(self.at_exit)
            if not faulthandler.is_enabled():
                # Kept open on purpose: the handler writes to it when the process crashes.
                self._stack = open(stack_file(self._file), "w", encoding="utf-8")  # noqa: SIM115
                faulthandler.enable(self._stack)
        threading.Thread(target=self._watch_starter, name="fulmen-starter-watch", daemon=True).start()

    def at_exit(self) -> None:
        """Report the ``sys.exit`` that ends this process, if there is one."""
        error = exit_of_a_run()
        if error is not None and os.getpid() == self._pid and not os.path.exists(self._file):
            record_exception(self._file, error)

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
            position = read_positions(self._notes).get(rank) if self._notes else None
            where = "" if position is None else f", at {position}"
            crash = read_stack(os.path.join(self._notes, MAIN)) if self._notes else ""
            end = crash or (
                "was killed or called os._exit, and left no Python traceback. "
                "A kill that nobody sent comes from the kernel when memory runs out."
            )
            report = (
                f"rank {rank} of {world_size} (process {self._starter}) ended first{where}; the run was ended. "
                "What is known of it:\n" + "".join(f"[rank{rank}]: {line}\n" for line in end.splitlines())
            )
            os.write(2, report.encode())
        os._exit(1)

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Leave the traceback to the starter, who prints the one that matters last instead of all of them mixed."""
        if os.getpid() != self._pid:  # a fork of this process
            self._hook_before(kind, error, trace)
            return
        if not self._starter_is_gone():
            record_exception(self._file, error)
        if is_consequence(error):
            # A killed process loses its connections a moment before it loses its children.
            until = time.monotonic() + 0.5
            while not self._starter_is_gone() and time.monotonic() < until:
                time.sleep(0.02)
            if self._starter_is_gone():
                self._announce_and_exit()
        elif self._starter_is_gone():
            self._hook_before(kind, error, trace)
