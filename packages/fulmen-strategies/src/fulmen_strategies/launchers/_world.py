"""The processes that this one has started: watched and ended, from the first launch to the program's end."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SubprocessContext,
    start_processes,  # pyright: ignore[reportUnknownVariableType]
)

from fulmen_protocols import read_positions
from fulmen_protocols.errors import MisconfigurationException, RankFailure
from fulmen_strategies._marks import LAUNCHED, NOTES
from fulmen_strategies.launchers._failure import (
    Failure,
    exit_of_a_run,
    is_consequence,
    read_failure,
    read_stack,
    stack_file,
    tell,
)
from fulmen_strategies.launchers._other_hosts import tell_other_hosts
from fulmen_strategies.launchers._pulse import Collective, Pulse, ask_all, last_collectives, read_standing, stack_here
from fulmen_strategies.launchers._rank import MAIN
from fulmen_strategies.launchers._verdict import odd_rank, others, recent

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["Request", "World", "refuse_other_request"]

_POLL_S = 0.1
_VERDICT_S = 1.5  # how long a lost connection may wait for the failure that explains it
_NOTICE_S = 4.0  # how long rank 0 may take to notice by itself that another rank has failed
_TERM_S = 1.0  # between SIGTERM and SIGKILL
_FINISH_S = 3.0  # how long the others may take to end when rank 0 ends after an error
_EXIT_S = 5.0  # how long rank 0 may take to leave the interpreter after a failure
_ANSWER_S = 0.7  # how long ranks may take to say where they are
_EXAMINE_S = 2.5  # how long all of that may take

_ENDING_SIGNALS = frozenset(
    {signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT}
)


class Request(NamedTuple):
    """What a launch asks for."""

    num_processes: int
    num_nodes: int
    node_rank: int
    main_address: str
    main_port: int

    @property
    def first_rank(self) -> int:
        """Global index of this node's first process."""
        return self.node_rank * self.num_processes

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.num_nodes * self.num_processes

    def environment(self, local_rank: int, threads: int) -> dict[str, str]:
        """The variables that a process of this node gets on top of the inherited ones."""
        variables = {
            "MASTER_ADDR": self.main_address,
            "MASTER_PORT": str(self.main_port),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "NODE_RANK": str(self.node_rank),
            LAUNCHED: str(os.getpid()),
        }
        if "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(threads)
        return variables


class World:
    """Ranks 1..N-1 of this node, seen from the first.

    A thread watches them. When one fails, the others are ended and ``settle`` gives the failure to whoever runs in the
    main thread; if nobody comes to hear of it within seconds, because the main thread hangs in a collective or
    computes, the thread prints the report and ends this process.
    """

    def __init__(self, request: Request, command: Sequence[str], threads: int) -> None:
        self.request = request
        self._command = list(command)
        self._threads = threads
        self._pid = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="fulmen-")
        self._context: SubprocessContext | None = None
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._failure: Failure | None = None
        self._verdict = threading.Event()  # there is a failure, or everybody ended well
        self._all_ended = threading.Event()
        self._is_ours = threading.Event()  # rank 0 has an error of its own: how the others end no longer matters
        self._is_delivered = threading.Event()  # the main thread knows of the failure
        self._report_at_exit = False
        # Of the ranks besides the one at fault, to be printed before its report.
        self._stacks: dict[int, list[str]] = {}
        self._collectives: dict[int, list[Collective]] = {}
        self._aborted: set[int] = set()  # indices of processes that were ended to learn where they were
        self._own_error: BaseException | None = None  # what rank 0 raises
        self._stopping = threading.Lock()
        self._hook_before = sys.excepthook
        self._failed_at = 0.0  # by the monotonic clock

    # ---------------------------------------------------------------- the main thread

    def start(self) -> None:
        """Start the processes and the watch."""
        # The thread itself starts them: torch would replace this program's signal handlers in the main thread.
        threading.Thread(target=self._run, name="fulmen-rank-watch", daemon=True).start()
        self._started.wait()
        if self._start_error is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise self._start_error
        Pulse(self._folder, self.request.first_rank).start()
        if not faulthandler.is_enabled():
            # Kept open on purpose: the handler writes to it if this process crashes, and rank 1 shows it.
            self._stack = open(stack_file(os.path.join(self._folder, MAIN)), "w", encoding="utf-8")  # noqa: SIM115
            faulthandler.enable(self._stack)
        self._hook_before = sys.excepthook  # that of the moment: the user may have set one
        sys.excepthook = self._on_uncaught
        atexit.register(self._at_exit)

    def resume(self) -> None:
        """Get ready for one more launch: an error of rank 0 that its user has caught lies in the past.

        Raises:
            RankFailure: some processes have ended, with an error or at the end of the script.
        """
        failures = [self._failure] if self._failure is not None else self._failures()
        if failures:
            raise RankFailure(str(min(failures, key=lambda failure: failure.time_s)))
        ended = [i + 1 for i, process in enumerate(self._processes()) if process.poll() is not None]
        if ended:
            ranks = ", ".join(str(self.request.first_rank + local_rank) for local_rank in ended)
            raise RankFailure(
                f"rank 0 launches again, but rank {ranks} has already ended: every rank must run through the same "
                "calls of the script."
            )
        self._own_error = None
        self._is_ours.clear()
        self._is_delivered.clear()

    def settle(self, error: BaseException) -> Failure | None:
        """Tell the watch that the main thread raises ``error``; return the failure of another rank that explains it."""
        self._own_error = error
        if is_consequence(error):
            self._verdict.wait(_VERDICT_S + _EXAMINE_S)
            if self._failure is not None:
                self._is_delivered.set()
                return self._failure
        self._is_ours.set()
        self._is_delivered.set()
        return None

    def signal(self, signum: int) -> None:
        """Send ``signum`` to every process that still lives; after one that ends processes their end is no failure."""
        if signum in _ENDING_SIGNALS:
            self._is_ours.set()
        for process in self._processes():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    # A process leads a group of its own, with its data loading workers: none of them may stay behind.
                    if signum == signal.SIGKILL:
                        os.killpg(process.pid, signum)
                    else:
                        os.kill(process.pid, signum)

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """End the other ranks before rank 0's traceback is printed, so that it, or that of the culprit, comes last."""
        if os.getpid() == self._pid:
            if self._failure is None and not self._is_ours.is_set():
                self.settle(error)
            if self._failure is not None and not self._is_ours.is_set():
                self._report_at_exit = True
                self._all_ended.wait(_TERM_S + 1)
                if isinstance(error, RankFailure):
                    return  # it says the same as the report
            else:
                self._is_ours.set()
                if not self._all_ended.wait(0.5):
                    self._ask_where_they_are()
                    if is_consequence(error):
                        # Nobody has failed, and still somebody did not come: that one is what the user has to know.
                        self._failure = self._late_failure() or self._who_kept_us_waiting()
                        self._report_at_exit = self._failure is not None
                    self._terminate()
                error.add_note(self._signature())
                if not self._report_at_exit:
                    tell(self._surroundings(self.request.first_rank))
        self._hook_before(kind, error, trace)

    def _signature(self) -> str:
        rank = self.request.first_rank
        position = read_positions(self._folder).get(rank)
        return f"raised on rank {rank} of {self.request.world_size}, at {position}"

    def _at_exit(self) -> None:
        if os.getpid() != self._pid:
            return
        if sys.excepthook == self._on_uncaught:
            sys.excepthook = self._hook_before
        if self._report_at_exit:
            self._all_ended.wait(_TERM_S + 1)
            self._print_report()
        elif self._is_ours.is_set() or exit_of_a_run() is not None:
            self._end_all(patience_s=_FINISH_S if self._is_ours.is_set() else 0.5)
            error = self._own_error if isinstance(self._own_error, SystemExit) else exit_of_a_run()
            if error is not None and error.code not in (None, 0):
                error.add_note(self._signature())
                rank = self.request.first_rank
                shown = "".join(traceback.format_exception(error)).splitlines()
                tell("".join(f"[rank{rank}]: {line}\n" for line in shown))
        else:
            try:
                self._all_ended.wait()
            except KeyboardInterrupt:
                self._end_all(patience_s=0)
            if self._failure is not None and not self._is_delivered.is_set():
                self._stop_this_process(self._failure)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask_where_they_are(self) -> None:
        """Learn the stacks of all ranks of this node; those that do not answer are aborted."""
        first = self.request.first_rank
        running: dict[int, int] = {}
        for i, process in enumerate(self._processes()):
            if os.path.exists(self._error_file(i)):
                failure = read_failure(self._error_file(i), rank=first + i + 1, world_size=0, pid=0, exit_code=None)
                self._stacks[first + i + 1] = failure.trace.splitlines()
            elif process.poll() is None:
                running[first + i + 1] = i
        ask_all(self._folder, set(running), _ANSWER_S)
        self._abort([i for rank, i in running.items() if read_standing(self._folder, rank) is None])
        for rank, i in running.items():
            self._stacks[rank] = self._stack_of(rank, i)
        if self._own_error is None:  # else its traceback is printed by itself
            self._stacks[first] = stack_here()

    def _stack_of(self, rank: int, index: int) -> list[str]:
        standing = read_standing(self._folder, rank)
        if standing is not None:
            return standing.stack
        return read_stack(self._error_file(index)).splitlines()[1:]  # without the word of the abort

    def _abort(self, indices: list[int]) -> None:
        """End processes by SIGABRT, at which faulthandler writes down where they were, even inside native code."""
        self._aborted.update(indices)
        processes = [self._processes()[i] for i in indices]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGABRT)
        _wait_for(processes, 1.0)

    def _late_failure(self) -> Failure | None:
        """What explains the error of rank 0 all the same, though it came when rank 0 no longer waited for it."""
        causes = [failure for failure in self._failures() if not failure.is_consequence]
        return min(causes, key=lambda failure: failure.time_s, default=None)

    def _who_kept_us_waiting(self) -> Failure | None:
        """The rank of this node for which the others have waited in vain, if that can be told."""
        first, positions = self.request.first_rank, read_positions(self._folder)
        failures = {failure.rank: failure for failure in self._failures()}
        collectives = self._collectives
        collectives[first] = last_collectives()
        for i in range(len(self._processes())):
            rank = first + i + 1
            standing = read_standing(self._folder, rank)
            if standing is not None:
                collectives[rank] = standing.collectives
            elif rank in failures:
                collectives[rank] = list(failures[rank].collectives)
        found = odd_rank(collectives, positions)
        if found is None:
            return None
        rank, reason = found
        known = failures.get(rank)
        if rank == first:
            error = self._own_error
            trace = "\n".join(stack_here()) if error is None else "".join(traceback.format_exception(error))
        else:
            trace = (
                known.trace if known is not None and known.trace else "\n".join(self._stack_of(rank, rank - first - 1))
            )
        return Failure(
            rank, self.request.world_size, positions[rank].pid, None, trace, time.time(), False, positions[rank],
            kept_waiting=reason,
        )  # fmt: skip

    def _error_file(self, index: int) -> str:
        assert self._context is not None
        return str(self._context.error_files[index])

    def _end_all(self, patience_s: float) -> None:
        self._is_ours.set()
        if not self._all_ended.wait(patience_s):
            self._terminate()

    # ---------------------------------------------------------------- the watching thread

    def _run(self) -> None:
        try:
            self._context = self._start_processes()
        except BaseException as error:  # noqa: BLE001  # raised again by start()
            self._start_error = error
            self._started.set()
            return
        self._started.set()
        try:
            self._watch()
        finally:
            self._verdict.set()
            self._all_ended.set()
        if self._failure is not None:
            self._see_this_process_end(self._failure)

    def _start_processes(self) -> SubprocessContext:
        local_ranks = range(self.request.num_processes - 1)
        quiet = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # it warns that it cannot install signal handlers, which is what we want
        try:
            context = start_processes(
                name="rank",
                entrypoint=self._command[0],
                args={i: tuple(self._command[1:]) for i in local_ranks},
                envs={i: {**self.request.environment(i + 1, self._threads), NOTES: self._folder} for i in local_ranks},
                logs_specs=DefaultLogsSpecs(log_dir=self._folder),
            )
        finally:
            quiet.setLevel(level)
        assert isinstance(context, SubprocessContext)
        return context

    def _watch(self) -> None:
        while True:
            failures = self._failures()
            if failures and not self._is_ours.is_set():
                began = time.monotonic()
                culprit = self._culprit(failures, began + _VERDICT_S)
                if culprit is not None:
                    self._failed_at = began
                    self._ask_where_they_are()
                    if culprit.is_consequence:  # then the cause is a rank that did not come
                        culprit = self._who_kept_us_waiting() or culprit
                    self._failure = culprit
                    self._verdict.set()
                    if not culprit.is_consequence:
                        tell_other_hosts(str(culprit))
                    self._terminate()
                    return
            if all(process.poll() is not None for process in self._processes()):
                return
            time.sleep(_POLL_S)

    def _culprit(self, failures: list[Failure], until: float) -> Failure | None:
        """The first failure that no lost connection explains; None when rank 0 turns out to have one of its own."""
        while True:
            first = min(failures, key=lambda failure: (failure.is_consequence, failure.time_s))
            settled = not first.is_consequence and first.exit_code is not None
            if settled or time.monotonic() > until:
                return first
            if self._is_ours.wait(_POLL_S / 2) and first.is_consequence:
                return None
            failures = self._failures()

    def _failures(self) -> list[Failure]:
        """How the processes that ended with an error, or are about to, have done so."""
        failures: list[Failure] = []
        positions = read_positions(self._folder)
        for i, process in enumerate(self._processes()):
            file = self._error_file(i)
            exit_code = process.poll()
            # The file comes first: a process may report its exception and then hang while it leaves.
            if i not in self._aborted and (exit_code or (exit_code is None and os.path.exists(file))):
                rank = self.request.first_rank + i + 1
                found = read_failure(
                    file, rank=rank, world_size=self.request.world_size, pid=process.pid, exit_code=exit_code
                )
                failures.append(replace(found, position=positions.get(rank)))
        return failures

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        if self._context is None:
            return []
        return [handler.proc for _, handler in sorted(self._context.subprocess_handlers.items())]

    def _terminate(self) -> None:
        """SIGTERM, then SIGKILL; each process leads a group of its own, with its data loading workers."""
        processes = self._processes()
        for signum, patience_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, 1.0)):
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signum)
            _wait_for(processes, patience_s)

    def _see_this_process_end(self, failure: Failure) -> None:
        if not self._is_delivered.wait(max(0.0, self._failed_at + _NOTICE_S - time.monotonic())):
            self._stop_this_process(failure)
        while threading.main_thread().is_alive():
            time.sleep(_POLL_S)
        time.sleep(_EXIT_S)
        self._stop_this_process(failure)

    # ---------------------------------------------------------------- either thread

    def _stop_this_process(self, failure: Failure) -> None:
        """Print the report and end now: exit status of the failed rank, 128 + signal if it was killed."""
        self._stopping.acquire()  # never released
        # The main thread may hold the stream's lock for ever.
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(0.5)
        self._print_report()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(failure.exit_status)

    def _print_report(self) -> None:
        assert self._failure is not None
        tell(f"{self._surroundings(self._failure.rank)}{self._failure}\n")

    def _surroundings(self, culprit: int) -> str:
        stacks = {rank: stack for rank, stack in sorted(self._stacks.items()) if rank != culprit}
        world_size = self.request.world_size
        return others(stacks, read_positions(self._folder), world_size) + recent(self._collectives, world_size)


def _wait_for(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(0.02)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or replaced by something else
            stream.flush()


def refuse_other_request(running: Request, asked: Request) -> None:
    """Raise unless ``asked`` is what ``running`` was.

    Raises:
        MisconfigurationException: they differ.
    """
    if asked != running:
        raise MisconfigurationException(
            f"this program runs with {running}, and cannot launch {asked} besides: the processes live until the "
            "program ends. Use the same devices and num_nodes throughout, or a program of its own."
        )
