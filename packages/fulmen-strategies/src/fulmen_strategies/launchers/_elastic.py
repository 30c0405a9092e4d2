"""The life of a process that an elastic agent has started: it leaves its error to the agent, and waits for no dead.

The agent (torchrun's, or that of ``fulmen run``) kills the other workers when one has failed, but SIGTERM does not
reach a process that waits in a collective with a handler of its own, and the agent then waits for half a minute. What
is shared is the folder of the agent's error files: there the workers of a node write where they are, so that one that
survives can tell of one that does not.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fulmen_protocols import Position, read_positions
from fulmen_strategies._marks import (
    LAUNCHED,
    STARTER_IS_NO_RANK,
    Starter,
    ended_unseen,
    exit_code_of,
    has_ended,
    process_exists,
)
from fulmen_strategies.launchers._failure import (
    Failure,
    exit_of_a_run,
    is_consequence,
    outlive_sigterm,
    read_failure,
    tell,
)
from fulmen_strategies.launchers._other_hosts import tell_other_hosts
from fulmen_strategies.launchers._own_end import OwnEnd
from fulmen_strategies.launchers._pulse import Collective, Pulse, ask_all, read_standing
from fulmen_strategies.launchers._verdict import odd_rank, others, recent

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["ElasticRank", "is_elastic"]

# All of these together, the stall limit aside, must leave time for the agent within ten seconds.
_POLL_S = 0.2
_VERDICT_S = 1.5  # how long a lost connection may wait for the failure that explains it
_NOTICE_S = 2.5  # how long a process may take to end by itself when another has failed
_PRECEDENCE_S = 1.5  # how long the one that has failed may take to end before those that fail in consequence
_REAPED_S = 4.0  # how long an agent on a busy machine may take to notice a process that has ended
_PATIENCE_S = 0.7  # how long ranks may take to say where they are
_REPORTED = "reported"
_VANISHED = "was killed by a signal or ended by os._exit, and left no Python traceback; its starter knows which."


def is_elastic() -> bool:
    """Whether an elastic agent of torch has started this process, and possibly others on this node."""
    return bool(os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("TORCHELASTIC_ERROR_FILE"))


class ElasticRank:
    """Reports this process's end in the agent's own way, and ends it when another one's end is seen, or the agent's.

    Attributes:
        end: where it is reported.
    """

    def __init__(self) -> None:
        self._file = os.environ["TORCHELASTIC_ERROR_FILE"]
        self._folder = str(Path(self._file).parent.parent)  # {folder of the attempt}/{local rank}/error.json
        self._rank = int(os.environ.get("RANK", "0"))
        self._first = self._rank - int(os.environ.get("LOCAL_RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._agent = Starter(int(os.environ.get(LAUNCHED, os.getppid())))
        # That of `fulmen run` prints whose fault it was, and where that one was; torchrun's prints a table.
        self._agent_tells = os.environ.get(STARTER_IS_NO_RANK) == "1"
        self._reporting = threading.Lock()  # this process must not end while its watch is in the middle of a report
        self._hook_before = sys.excepthook
        sys.excepthook = self._on_uncaught
        self.end = OwnEnd(self._file)
        Pulse(self._folder, self._rank).start()
        threading.Thread(target=self._watch, name="fulmen-peer-watch", daemon=True).start()

    # ---------------------------------------------------------------- this process fails

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self.end.is_of_this_process:
            first: Failure | None = None
            if is_consequence(error):
                outlive_sigterm()
                cause = self._wait_for_a_cause()
                if cause is None:
                    self.end.record(error)  # so that others do not take it for the cause
                    cause = first = self._who_kept_us_waiting()
                    self.end.record(error, first)  # the agent must find it when the report has ended that one
                self._report(cause)
                if cause is not None and first is None:
                    _let_end(cause.pid)
                # Looking for garbage among some 300,000 objects three times is most of what a process of torch does at
                # its end, and the agent waits for all ranks.
                gc.freeze()
            if not self._agent_tells:
                # Its message is what the agent shows last, so it begins with whose it is.
                position = read_positions(self._folder).get(self._rank)
                error.add_note(f"raised on rank {self._rank} of {self._world_size}, at {position}")
            self.end.record(error, first)
            if self._agent_tells and not self._agent.is_gone():
                return
        self._hook_before(kind, error, trace)

    def _wait_for_a_cause(self) -> Failure | None:
        until = time.monotonic() + _VERDICT_S
        while time.monotonic() < until:
            cause = self._failed()
            if cause is not None:
                return cause
            time.sleep(_POLL_S / 4)
        return None

    def _who_kept_us_waiting(self) -> Failure | None:
        positions = read_positions(self._folder)
        silent = {rank for rank in positions if not os.path.exists(self._file_of(rank))}
        ask_all(self._folder, silent, _PATIENCE_S)
        found = odd_rank(self._collectives(positions), positions)
        if found is None:
            return None
        rank, reason = found
        standing = read_standing(self._folder, rank)
        trace = "\n".join(standing.stack) if standing is not None else self._read(rank, positions[rank]).trace
        return Failure(
            rank, self._world_size, positions[rank].pid, None, trace, time.time(), False, positions[rank],
            kept_waiting=reason,
        )  # fmt: skip

    # ---------------------------------------------------------------- another one fails

    def _watch(self) -> None:
        while True:
            if self._agent.is_gone():
                if self._rank == self._first:
                    tell(self._agent.last_words())
                os._exit(1)
            cause = self._failed()
            # Where somebody has reported already, it may be this process that hangs: SIGTERM would not end it.
            is_over = cause is not None or os.path.exists(os.path.join(self._folder, _REPORTED))
            # All ranks may stop at one step and leave by sys.exit (when the job is being ended, say), some sooner than
            # others: then this one still has things to do.
            if is_over and exit_of_a_run() is None:
                break
            time.sleep(_POLL_S)
        self._report(cause)
        time.sleep(_NOTICE_S)
        os._exit(1)

    def _failed(self) -> Failure | None:
        """The process of this node that was the first to fail by itself, or to vanish from the middle of a run."""
        found: list[tuple[bool, float, int, Failure]] = []
        for rank, position in read_positions(self._folder).items():
            has_said = os.path.exists(self._file_of(rank))
            if rank == self._rank or not (has_said or (position.phase != 0 and has_ended(position.pid))):
                continue
            failure = self._read(rank, position)
            if not failure.is_consequence:
                # With SIGTERM the agent ends the others.
                by_agent = failure.exit_code == -signal.SIGTERM and not has_said
                found.append((by_agent, failure.time_s if has_said else position.seen_s, rank, failure))
        return min(found)[-1] if found else None

    def _read(self, rank: int, position: Position) -> Failure:
        file, exit_code = self._file_of(rank), exit_code_of(position.pid)
        found = read_failure(file, rank=rank, world_size=self._world_size, pid=position.pid, exit_code=exit_code)
        trace = found.trace or ("" if exit_code is not None else _VANISHED)
        return replace(found, trace=trace, position=position)

    def _file_of(self, rank: int) -> str:
        return os.path.join(self._folder, str(rank - self._first), Path(self._file).name)

    def _report(self, failure: Failure | None) -> None:
        """Print what is known, unless another process of this node does, or the agent will."""
        if failure is None:
            return
        with self._reporting:
            try:
                os.close(os.open(os.path.join(self._folder, _REPORTED), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            tell_other_hosts(str(failure))
            positions = read_positions(self._folder)
            alive = {rank for rank, each in positions.items() if rank != failure.rank and not has_ended(each.pid)}
            ask_all(self._folder, alive, _PATIENCE_S)
            standing = {rank: read_standing(self._folder, rank) for rank in alive}
            stacks = {rank: said.stack for rank, said in standing.items() if said is not None}
            text = others(stacks, positions, self._world_size)
            if failure.kept_waiting:
                text += recent(self._collectives(positions), self._world_size)
            tell(text if self._agent_tells else f"{text}{failure}\n")

    def _collectives(self, positions: dict[int, Position]) -> dict[int, list[Collective]]:
        found: dict[int, list[Collective]] = {}
        for rank, position in positions.items():
            standing = read_standing(self._folder, rank)
            found[rank] = list(self._read(rank, position).collectives if standing is None else standing.collectives)
        return found


def _let_end(pid: int) -> None:
    """Wait for that process to end, and for the agent to see it: it takes for the cause what it sees first."""
    began = time.monotonic()
    while process_exists(pid):
        if time.monotonic() - began > (_REAPED_S if ended_unseen(pid) else _PRECEDENCE_S):
            return
        time.sleep(0.02)
