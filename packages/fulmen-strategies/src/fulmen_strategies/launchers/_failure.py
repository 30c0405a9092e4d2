"""How a rank tells the one that started it why it ended, and how that is told to the user."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fulmen_protocols import current_whereabouts
from fulmen_strategies.launchers._pulse import Collective, last_collectives

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_protocols import Position

__all__ = [
    "Failure",
    "exit_of_a_run",
    "is_consequence",
    "outlive_sigterm",
    "read_failure",
    "read_stack",
    "record_exception",
    "stack_file",
    "tell",
]

# What the transports say when a peer has vanished. It decides only whom to ask first and how long to wait for a better
# answer, never whether something is an error.
_SIGNS_OF_A_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "failed to recv",
    "gloo",
    "nccl",
    "distbackenderror",
    "distnetworkerror",
    "diststoreerror",
    "socket timeout",
)

# How long after a failure an agent that is kept busy may notice it, where the process could not write down when it was.
_PUT_OFF_S = 5


@dataclass(frozen=True)
class Failure:
    """How one rank ended.

    Attributes:
        rank: its index among all processes.
        world_size: their number.
        pid: its process id.
        exit_code: as ``Popen.returncode`` has it, negative for a signal; None while it is still ending.
        trace: its own traceback, or "" if it left none.
        time_s: when, in seconds since the epoch.
        is_consequence: it looks as if another rank had vanished first.
        position: where it was last, if that is known.
        collectives: the last ones that it had begun, if torch has recorded them.
        kept_waiting: how it differed from the others, which waited for it in vain; "" if it ended by itself.
    """

    rank: int
    world_size: int
    pid: int
    exit_code: int | None
    trace: str
    time_s: float
    is_consequence: bool
    position: Position | None = None
    collectives: Sequence[Collective] = ()
    kept_waiting: str = ""

    @property
    def exit_status(self) -> int:
        """What a shell would call it: the exit code, 128 + signal, or 1."""
        if self.exit_code is None:
            return 1
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    @property
    def charge(self) -> str:
        """Of a rank that kept the others waiting: which, where and how, as the beginning of a sentence."""
        return f"{self._who} kept the others waiting{self._where}: {self.kept_waiting}"

    @property
    def _who(self) -> str:
        return f"rank {self.rank} of {self.world_size} (process {self.pid})"

    @property
    def _where(self) -> str:
        return "" if self.position is None else f", at {self.position}"

    def __str__(self) -> str:
        prefix = f"[rank{self.rank}]: "
        if self.kept_waiting:
            head = f"{self.charge}. The run was ended. There it stood:"
            return "\n".join([head, *(prefix + line for line in self.trace.splitlines() or ["an unknown place"])])
        if self.exit_code is not None and self.exit_code < 0:
            how = f"was killed by {_signal_name(-self.exit_code)}"
        elif self.exit_code is not None and not self.trace:
            how = f"ended with exit code {self.exit_code}"
        else:
            how = "failed"
        lines = self.trace.rstrip().splitlines() or [f"{how} and left no Python traceback.{self._advice()}"]
        head = f"{self._who} {how} first{self._where}; the run was ended. Its own report:"
        return "\n".join([head, *(prefix + line for line in lines)])

    def _advice(self) -> str:
        if self.exit_code == -signal.SIGKILL:
            return " SIGKILL that nobody sent comes from the kernel when memory runs out."
        if self.exit_code is not None and self.exit_code > 0:
            return " It called exit, or its traceback is further up."
        return ""


def record_exception(file: str, error: BaseException, first: Failure | None = None) -> None:
    """Write ``error`` to ``file`` in the layout of torch's elastic agent, in one step: a reader sees all or nothing.

    Args:
        file: where its starter will look.
        error: what ended this process.
        first: the rank that kept this one waiting; an agent cannot know.
    """
    shown = "".join(traceback.format_exception(error))
    now, consequence = time.time(), is_consequence(error)
    # torch's agents show the failure with the smallest timestamp, in whole seconds, as the cause of all others.
    timestamp = int(now + (_PUT_OFF_S if consequence else 0))
    reply = {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": shown, "timestamp": str(timestamp)},
        },
        "time_s": now,
        "exit_code": error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1,
        "is_consequence": consequence,
        "collectives": last_collectives(),
        "first": None if first is None else {"rank": first.rank, "charge": first.charge, "trace": first.trace},
    }
    draft = f"{file}.{os.getpid()}"
    Path(draft).write_text(json.dumps(reply), encoding="utf-8")
    os.replace(draft, file)


def exit_of_a_run() -> SystemExit | None:
    """The ``sys.exit`` with an error that has ended a run in this process: Python says nothing about it."""
    note = current_whereabouts()
    error = None if note is None else note.error
    return error if isinstance(error, SystemExit) and error.code not in (None, 0) else None


def read_failure(file: str, *, rank: int, world_size: int, pid: int, exit_code: int | None) -> Failure:
    """What the process has written to ``file``, or what its exit code alone says."""
    trace, time_s, consequence = "", time.time(), False
    collectives: list[Collective] = []
    try:
        reply = json.loads(Path(file).read_text(encoding="utf-8"))
        trace = str(reply["message"]["extraInfo"]["py_callstack"])
        time_s = float(reply.get("time_s", time_s))  # absent when torch's own @record has written the file
        consequence = bool(reply.get("is_consequence", _sounds_like_a_lost_peer(trace)))
        collectives = [Collective(*entry) for entry in reply.get("collectives", ())]
    except (OSError, ValueError, KeyError, TypeError):
        trace = read_stack(file)
    return Failure(rank, world_size, pid, exit_code, trace, time_s, consequence, collectives=collectives)


def tell(text: str) -> None:
    """Write ``text`` to the terminal at once, if there still is one: who ends processes must not fail over a report."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def stack_file(file: str) -> str:
    """Where faulthandler writes the Python stack of a process that crashes in native code."""
    return f"{file}.stack"


def read_stack(file: str) -> str:
    """What faulthandler has left there of the thread that got the signal; "" if nothing."""
    try:
        text = Path(stack_file(file)).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    head, found, rest = text.partition("Current thread")
    lines = (head.splitlines()[:1] + (found + rest).splitlines()) if found else text.splitlines()
    return "\n".join(line for line in lines if line and not line.startswith("Extension modules"))


def is_consequence(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, looks as if a peer had vanished."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        # User errors mention a library now and then; what torch and the operating system raise are these two kinds.
        if isinstance(link, (RuntimeError, OSError)) and _sounds_like_a_lost_peer(f"{type(link).__name__}: {link}"):
            return True
        link = link.__cause__ or link.__context__
    return False


def _sounds_like_a_lost_peer(text: str) -> bool:
    lowered = text.lower()
    return any(sign in lowered for sign in _SIGNS_OF_A_LOST_PEER)


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def outlive_sigterm() -> None:
    """Be not ended by SIGTERM from here on: this process ends in seconds by itself, and has something to tell first."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
