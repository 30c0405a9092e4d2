"""What ranks of several hosts tell each other of their ends, through the store at which they have met.

The processes of one host are watched by whoever has started them. Between hosts there is only the network, and a lost
connection says neither who was at fault nor that the run is over. So a rank that fails leaves its last words in the
store; each rank has a thread that waits there, over a connection of its own and at no cost, for the first of them. It
says where its rank stands, so that one that hangs is found out, and ends it if it does not end by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from fulmen_protocols import Whereabouts, current_whereabouts
from fulmen_protocols.errors import RankFailure
from fulmen_strategies._meeting import another_connection, append, set_all
from fulmen_strategies.launchers._failure import is_consequence, outlive_sigterm, record_exception, tell
from fulmen_strategies.launchers._pulse import collectives_begun, stack_here

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torch._C._distributed_c10d import Store

    from fulmen_protocols.topology import Topology

__all__ = ["OtherHosts", "is_told", "tell_other_hosts"]

T = TypeVar("T")

_FOREVER = timedelta(days=10_000)
_ANSWER_S = 2.0  # how long the store may take; over a network that loses everything it never answers
_WORDS_S = 2.5  # how long the words that explain a lost connection may be on their way
_STANDING_S = 0.7  # how long ranks may take to say where they stand
_PING_S = 5.0  # how often other hosts ask whether that of rank 0 is there
_NOTICE_S = 6.0  # how long a rank may take to end by itself when the run is over

_here: OtherHosts | None = None
_told: BaseException | None = None


def is_told(error: BaseException) -> None:
    """The others know already what ``error`` says: a launcher raises it for another process of this host."""
    global _told
    _told = error


def tell_other_hosts(report: str) -> None:
    """Leave word of a process of this host that has failed, for those who watch it; nothing on one host.

    Args:
        report: which rank it was, how it ended and where, and its traceback.
    """
    if _here is not None:
        _here.leave_word(report, is_consequence=False)


class OtherHosts:
    """The ranks of the other hosts, seen from this one.

    Args:
        store: of all ranks, with a prefix of this start of them. Its connections are copied, so that nobody waits for
            a thread that waits.
        topology: this process's place.
        timeout: after which a host of rank 0 that does not answer is taken for lost.
    """

    def __init__(self, store: Store, topology: Topology, timeout: timedelta) -> None:
        self._store, self._watching = another_connection(store), another_connection(store)
        self._topology = topology
        self._timeout_s = timeout.total_seconds()
        self._ends = threading.Event()
        self._host = socket.gethostname()
        self._with_us = threading.Event()
        self._first: dict[str, str] | None = None
        self._is_silent = False  # the store did not answer
        self._has_failed = threading.Event()
        self._hook_before = sys.excepthook
        self._pid = os.getpid()
        self._call = f"over/{topology.rank}"
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Watch, and take part in every uncaught error of this process from now on."""
        global _here
        _here = self
        self.join()
        _answered(self._enter)
        if current_whereabouts() is None:
            # Nobody on this host has asked where this process is, and the other hosts will.
            folder = tempfile.mkdtemp(prefix="fulmen-")
            Whereabouts.open(folder, self._topology.rank)
            shutil.rmtree(folder, ignore_errors=True)  # it is read from memory
        self._hook_before, sys.excepthook = sys.excepthook, self._on_uncaught
        self._thread = threading.Thread(target=self._watch, name="fulmen-other-hosts", daemon=True)
        self._thread.start()
        if self._topology.node_rank != 0:
            threading.Thread(target=self._look_for_rank_zero, name="fulmen-ping", daemon=True).start()
        atexit.register(self._stop)

    def _enter(self) -> None:
        # An agent's store may hold the words of ranks that it has started before.
        self._store.delete_key(self._call)
        if self._topology.rank == 0:
            for key in ("cause", "failed", "failed nodes", "standing"):
                self._store.delete_key(key)
        if self._topology.local_rank == 0:
            self._store.set(f"host/{self._topology.node_rank}", self._host)

    def join(self) -> None:
        """From now on the end of another rank is the end of this one."""
        self._with_us.set()

    def leave(self) -> None:
        """This process is done with the others: their ends are no longer its own business."""
        self._with_us.clear()

    @property
    def is_over(self) -> bool:
        """Whether some rank has failed already, as far as this process has heard."""
        return self._first is not None

    def leave_word(self, report: str, *, is_consequence: bool) -> None:
        """Tell all ranks that the run is over; the first cause is kept."""
        place = self._topology
        words = {
            "rank": str(place.rank), "node": str(place.node_rank), "host": self._host, "report": report,
        }  # fmt: skip

        def write() -> bool:
            if not is_consequence:
                self._store.compare_set("cause", "", json.dumps(words))
            append(self._store, "failed", f"{place.rank} ")
            append(self._store, "failed nodes", f"{place.node_rank} ")
            ranks = range(place.world_size)
            set_all(self._store, [f"over/{rank}" for rank in ranks], json.dumps(words))
            return True

        self._is_silent = _answered(write) is None

    # ---------------------------------------------------------------- this process fails

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # A launcher's RankFailure tells of another process of this host, for which it has left word.
        is_ours = os.getpid() == self._pid and error is not _told and not isinstance(error, KeyboardInterrupt)
        if self._with_us.is_set() and is_ours:
            self.explain(error)
        self._hook_before(kind, error, trace)

    def explain(self, error: BaseException) -> None:
        """Leave word of ``error``; if another host explains it, add a note that says what is known of that."""
        place = self._topology
        note = current_whereabouts()
        at = "" if note is None else f", at {note.read()}"
        shown = "".join(traceback.format_exception(error))
        lines = "".join(f"[rank{place.rank}]: {line}\n" for line in shown.splitlines())
        lost = is_consequence(error) or isinstance(error, RankFailure)
        if lost:
            outlive_sigterm()  # a starter that ends this process may come before the words of who was at fault
        self._has_failed.set()
        self.leave_word(
            f"rank {place.rank} of {place.world_size} (process {self._pid}) failed{at}. Its own report:\n{lines}",
            is_consequence=lost,
        )
        if lost and (explanation := self._explanation()):
            error.add_note(explanation)

    def _explanation(self) -> str:
        until = time.monotonic() + (0.0 if self._is_silent else _WORDS_S)
        while True:
            cause = self._cause()
            if cause is not None:
                return "" if cause["node"] == str(self._topology.node_rank) else _quoted(cause)
            if time.monotonic() > until:
                return self._who_is_missing()
            time.sleep(0.05)

    def _cause(self) -> dict[str, str] | None:
        def read() -> str:
            return self._store.get("cause").decode() if self._store.check(["cause"]) else ""

        text = None if self._is_silent else _answered(read)
        if text:
            return cast("dict[str, str]", json.loads(text))
        return self._first if self._first is not None and self._first.get("is_cause") else None

    def _who_is_missing(self) -> str:
        """Nobody has an error of its own: of whom nothing is known, or who only waits."""
        place = self._topology

        def read() -> tuple[set[int], set[int], dict[int, str], dict[int, dict[str, str]]]:
            failed = _numbers(self._store, "failed")
            standing: dict[int, dict[str, str]] = {}
            for rank in sorted(_numbers(self._store, "standing")):
                standing[rank] = json.loads(self._store.get(f"standing/{rank}"))
            hosts = {
                node: self._store.get(f"host/{node}").decode()
                for node in range(place.num_nodes)
                if self._store.check([f"host/{node}"])
            }
            return failed, _numbers(self._store, "failed nodes"), hosts, standing

        found = None if self._is_silent else _answered(read)
        if found is None:
            return (
                f"Seen from {self._host} (node {place.node_rank}): the host of rank 0, {place.main_address}, does not "
                "answer any more. It or its process 0 is gone, or the network between the two."
            )
        failed, nodes, hosts, standing = found
        # Who has begun as many collectives as this rank waits there, too, and has not given up yet.
        begun = collectives_begun()
        late = {rank: said for rank, said in standing.items() if rank not in failed and int(said["begun"]) < begun}
        nodes |= {int(said["node"]) for said in standing.values()}
        if late:
            rank, said = next(iter(late.items()))
            others = f" ({len(late) - 1} more ranks do so, too)" if len(late) > 1 else ""
            return (
                f"rank {rank} of {place.world_size} on {said['host']} (node {said['node']}) kept the others "
                f"waiting{said['at']}{others}. There it stood:\n{said['stack']}"
            )
        silent = [node for node in range(place.num_nodes) if node not in nodes and node != place.node_rank]
        per_node = place.world_size // place.num_nodes
        if not silent:
            # Every host has said something, but perhaps not each of its ranks.
            elsewhere = (rank for rank in range(place.world_size) if rank // per_node != place.node_rank)
            gone = [rank for rank in elsewhere if rank not in failed and rank not in standing]
            if not gone:
                return ""
            node = gone[0] // per_node
            ranks, host = ", ".join(map(str, gone)), hosts.get(node, "an unknown host")
            return (
                f"Seen from {self._host} (node {place.node_rank}): nothing is heard of rank {ranks} of "
                f"{place.world_size}, the first of them on {host} (node {node}). It was killed, or has ended without "
                "a word. What that host has printed itself may tell."
            )
        names = ", ".join(f"{hosts.get(node, 'an unknown host')} (node {node})" for node in silent)
        return (
            f"Seen from {self._host} (node {place.node_rank}): nothing is heard of {names}. Its processes were killed, "
            "the host is down, or the network between the two is. What it has printed itself may tell."
        )

    # ---------------------------------------------------------------- another one fails

    def _stop(self) -> None:
        """Have the thread end: one that waits in the store when the interpreter is finalised aborts the process."""
        self.leave()
        self._ends.set()
        if os.getpid() == self._pid and self._thread is not None and self._thread.is_alive() and not self._is_silent:
            if not self.is_over:
                _answered(lambda: self._store.set(self._call, ""), 1.0)
            self._thread.join(1.0)

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: connections tell
            self._watching.wait([self._call], _FOREVER)
            words = self._watching.get(self._call)
            if not words:
                return  # this process ends
            self._first = json.loads(words)
            with contextlib.suppress(RuntimeError):
                if self._watching.check(["cause"]):
                    self._first = {**json.loads(self._watching.get("cause")), "is_cause": "yes"}
            self._say_where_we_stand()
        if self._first is None or not self._with_us.is_set():
            return
        until = time.monotonic() + _NOTICE_S
        # A rank that has got an error may be saving because of it, for as long as that takes.
        while self._with_us.is_set() and (time.monotonic() < until or _is_ending()):
            time.sleep(0.1)
        if self._with_us.is_set():
            self._end(self._first)

    def _look_for_rank_zero(self) -> None:
        """End this process where rank 0's host says nothing for longer than ranks wait in a collective.

        What the main thread asks the store has no limit of its own, and a network that loses everything never closes a
        connection.
        """
        while not self._ends.wait(min(_PING_S, self._timeout_s / 4)):
            began = time.monotonic()
            if _answered(lambda: self._store.check(["host/0"]), self._timeout_s + _ANSWER_S) is not None:
                continue
            waited = time.monotonic() - began
            if waited < self._timeout_s:
                return  # it has closed the store; connections tell
            while self._with_us.is_set() and _is_ending():
                time.sleep(0.1)
            if self._with_us.is_set():
                self._is_silent = True
                words = (
                    f"the host of rank 0, {self._topology.main_address}, has not answered {self._host} (node "
                    f"{self._topology.node_rank}) for {waited:.0f} s: it is down, or the network between the two is."
                )
                self._end({"host": self._host, "node": str(self._topology.node_rank), "report": words})
            return

    def _say_where_we_stand(self) -> None:
        """Once the others have had time to see what this one sees; who has an error by then is not waited for."""
        if not self._with_us.is_set() or self._has_failed.wait(_STANDING_S):
            return
        place = self._topology
        note = current_whereabouts()
        stack = "".join(f"[rank{place.rank}]: {line}\n" for line in stack_here())
        said = {
            "host": self._host, "node": str(place.node_rank), "stack": stack,
            "at": "" if note is None else f", at {note.read()}", "begun": str(collectives_begun()),
        }  # fmt: skip
        self._watching.set(f"standing/{place.rank}", json.dumps(said))
        append(self._watching, "standing", f"{place.rank} ")

    def _end(self, first: dict[str, str]) -> None:
        place = self._topology
        if not self._has_failed.is_set():
            said = "".join(f"[rank{place.rank}]: {line}\n" for line in stack_here())
            tell(
                f"rank {place.rank} of {place.world_size} on {self._host} is ended: the run is over, and it stood at:\n"
                f"{said}{_quoted(first)}\n"
            )
            file = os.environ.get("TORCHELASTIC_ERROR_FILE")
            if file:  # who has started this process shows what is there, and shows it last
                with contextlib.suppress(OSError):
                    record_exception(file, RankFailure(_quoted(first)))
        os._exit(1)


def _quoted(words: dict[str, str]) -> str:
    return f"On {words['host']} (node {words['node']}): {words['report'].rstrip()}"


def _is_ending() -> bool:
    note = current_whereabouts()
    return note is not None and note.error is not None


def _numbers(store: Store, key: str) -> set[int]:
    return {int(word) for word in store.get(key).split()} if store.check([key]) else set()


def _answered(question: Callable[[], T], patience_s: float = _ANSWER_S) -> T | None:
    """What the store answers; None where it does not in time, or is gone."""
    answers: list[T] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            answers.append(question())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience_s)
    return answers[0] if answers else None
