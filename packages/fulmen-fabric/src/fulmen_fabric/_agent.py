"""The process of ``fulmen run``: it holds torch's elastic agent, and says at the end which rank failed first."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fulmen_fabric._devices import find_accelerator, find_devices
from fulmen_fabric._hanging import end_hanging_children, has_children
from fulmen_fabric._notes import Notes
from fulmen_fabric._precisions import find_precision
from fulmen_protocols import STRATEGIES, available, did_you_mean, read_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from fulmen_fabric.run import Request
    from fulmen_protocols import Position

__all__ = ["Processes", "endpoint", "plan", "supervise"]

_DEFAULT_ADDRESS, _DEFAULT_PORT = "127.0.0.1", 29400
_NOTICE_S = 30.0
_ENDED_BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM)
_NOT_BY_AN_AGENT = ("spawn", "fork", "notebook", "xla")
_AGENT = "FULMEN_LAUNCHED"
"""Tells the ranks who started them: they report their end to this process, and do not outlive it."""


class Processes(NamedTuple):
    """The processes of this node."""

    ids: tuple[int, ...]
    """Of their devices, in the order of local ranks."""
    has_ids: bool
    """Whether the ids name devices; those of a CPU only count."""

    def as_argument(self) -> str:
        """As ``devices=`` of a Fabric or Trainer."""
        if not self.has_ids or self.ids == tuple(range(len(self.ids))):
            return str(len(self.ids))
        return ",".join(map(str, self.ids)) + ("," if len(self.ids) == 1 else "")

    def without(self, local_rank: int) -> Processes:
        """The same without one of them."""
        return self._replace(ids=self.ids[:local_rank] + self.ids[local_rank + 1 :])


def plan(request: Request) -> Processes:
    """Which devices of this node get a process.

    Raises:
        MisconfigurationException: with everything that contradicts itself or is not there.
    """
    notes = Notes()
    if request.accelerator == "tpu":
        notes.conflicts.add("--accelerator='tpu': torch's agent starts no TPU processes. Run the script with python.")
        notes.conflicts.raise_if_any()
    asked: object = int(request.devices) if request.devices.isdigit() else request.devices
    accelerator = find_accelerator(request.accelerator or "auto", notes)
    found = None
    if accelerator is not None:
        found = find_devices(asked, accelerator, accelerator.name(), None, request.num_nodes, notes)
    if request.strategy is not None and (refusal := _refuse_strategy(request.strategy, available(STRATEGIES))):
        notes.conflicts.add(refusal)
    if request.precision is not None:
        find_precision(request.precision, None, None, found[1][0].type if found else None, notes)
    count = len(found[0]) if found else 1
    if request.min_devices is not None and request.min_devices > count:
        notes.conflicts.add(f"--min-devices={request.min_devices} is more than the {count} of --devices={asked!r}.")
    notes.conflicts.raise_if_any()
    assert found is not None
    ids = tuple(found[0][:1]) if request.strategy == "dp" else tuple(found[0])  # one process drives all devices
    return Processes(ids, has_ids=found[1][0].type != "cpu")


def _refuse_strategy(name: str, known: Sequence[str]) -> str | None:
    """Why an agent cannot start the processes of this strategy; None if it can."""
    if any(word in name for word in _NOT_BY_AN_AGENT):
        return (
            f"--strategy={name!r} starts its processes by itself, and fulmen run has started them already: "
            "use its counterpart such as 'ddp', or run the script with python."
        )
    if name != "auto" and name not in known:
        return f"--strategy={name!r} is not installed.{did_you_mean(name, known)} There are {', '.join(known)}."
    return None


def supervise(request: Request, processes: Processes) -> int:
    """Run the script until it ends well, or fails once more than it may; return the exit status."""
    # torch's agent reports failures in a table of its own; ours ends with the traceback of the rank that failed first.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    # Else the agents' store still holds the dead ranks' addresses after a restart, and about half of the restarts fail
    # or hang (pytorch/pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[_AGENT] = str(os.getpid())
    os.environ["FULMEN_AGENT"] = "1"
    left = request.max_restarts
    while True:
        os.environ.update(request.variables(_devices_argument(request, processes)))
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, _usable_cpus() // len(processes.ids)))
        shrinks = request.min_devices is not None
        try:
            _launch(request, processes, max_restarts=0 if shrinks else left)
        except _Failed as failed:
            if not shrinks or left == 0 or len(processes.ids) <= (request.min_devices or 1):
                print(failed.report("the run was ended"), file=sys.stderr, flush=True)
                return failed.exit_status
            left -= 1
            processes = processes.without(failed.local_rank)
            how = f"{len(processes.ids)} processes go on without it ({left} restarts are left)"
            print(failed.report(how), file=sys.stderr, flush=True)
        except SignalException as error:
            print(f"fulmen run got {signal.Signals(error.sigval).name}; its processes got it too.", file=sys.stderr)
            return 128 + int(error.sigval)
        else:
            return 0


def endpoint(request: Request) -> str:
    """Where the agents of all nodes meet: host and port of node 0; port 0 is any that is free."""
    port = request.main_port or (0 if request.num_nodes == 1 else _DEFAULT_PORT)
    return f"{request.main_address or _DEFAULT_ADDRESS}:{port}"


def _devices_argument(request: Request, processes: Processes) -> str:
    return request.devices if request.strategy == "dp" else processes.as_argument()


def _launch(request: Request, processes: Processes, max_restarts: int) -> None:
    """Run the processes to their end.

    Raises:
        _Failed: one has failed, and all have ended.
    """
    address = request.main_address or _DEFAULT_ADDRESS
    configs: dict[str, object] = {"is_host": request.node_rank == 0}
    backend = "c10d"
    if request.num_nodes > 1 and max_restarts == 0:
        backend = "static"
        configs = {"rank": request.node_rank}  # nodes keep the ranks that they were given
    folder = tempfile.mkdtemp(prefix="fulmen-run-")
    config = LaunchConfig(
        min_nodes=request.num_nodes,
        max_nodes=request.num_nodes,
        nproc_per_node=len(processes.ids),
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        run_id=uuid.uuid4().hex if request.num_nodes == 1 else "fulmen",
        rdzv_backend=backend,
        rdzv_endpoint=endpoint(request),
        rdzv_configs=configs,
        max_restarts=max_restarts,
        # A host's own name cannot always be resolved.
        local_addr=address if request.num_nodes == 1 else None,
    )
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    propagated, log.propagate = log.propagate, False
    relay = _SaysWhoFailed(max_restarts, folder)
    log.addHandler(relay)
    try:
        end_hanging_children()
        if request.num_nodes > 1:
            threading.Thread(target=_say_what_we_wait_for, args=(request,), name="fulmen-waiting", daemon=True).start()
        elastic_launch(config, sys.executable)("-u", *request.script, *request.script_args)
    except ChildFailedError as error:
        raise _Failed(error, len(processes.ids) * request.num_nodes, folder) from None
    finally:
        log.removeHandler(relay)
        log.propagate = propagated
        shutil.rmtree(folder, ignore_errors=True)


def _say_what_we_wait_for(request: Request) -> None:
    """Every half a minute, until this node's processes have started: the agents meet first, and torch's are silent."""
    began, due = time.monotonic(), _NOTICE_S
    while not has_children():
        time.sleep(0.5)
        waited = time.monotonic() - began
        if waited >= due:
            due += _NOTICE_S
            print(
                f"fulmen run on {socket.gethostname()} (node {request.node_rank} of {request.num_nodes}) has waited "
                f"for {waited:.0f} s: the nodes meet at {endpoint(request)} on node 0, and not all have come. Each "
                "needs the same command with a --node-rank of its own, and must reach that address and port.",
                file=sys.stderr,
                flush=True,
            )


class _SaysWhoFailed(logging.Handler):
    """Says why the processes start again: the agent tells its caller of the last failure only, and logs the others."""

    def __init__(self, max_restarts: int, folder: str) -> None:
        super().__init__(logging.ERROR)
        self._max_restarts = max_restarts
        self._folder = folder
        self._restarts = 0

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args
        if not str(record.msg).startswith("failed (exitcode") or not isinstance(args, tuple) or len(args) < 3:
            return
        exit_code, local_rank, pid = cast("tuple[int, int, int]", args[:3])
        self._restarts += 1
        if self._restarts > self._max_restarts:
            return  # the final report follows
        how = f"ended with exit code {exit_code}"
        if exit_code < 0:
            how = f"was killed by signal {-exit_code}"
        text = (
            f"the process of local rank {local_rank} (process {pid}{_at(self._folder, pid)}) {how}; "
            f"all processes start again (restart {self._restarts} of {self._max_restarts})."
        )
        print(text, file=sys.stderr, flush=True)


def _comes_first(item: tuple[int, ProcessFailure]) -> tuple[bool, int, float, int]:
    """Orders failures: first no rank that the agent has ended, none that lost a connection, then the earliest.

    Of those that lost a connection one that knows to whom comes first.
    """
    rank, failure = item
    reply = failure.error_file_data
    ended = failure.exitcode in _ENDED_BY_SIGTERM and "time_s" not in reply
    explains = 0
    if reply.get("is_consequence"):
        explains = 2 if reply.get("first") is None else 1
    return ended, explains, float(reply.get("time_s", failure.timestamp)), rank


class _Failed(Exception):  # it is caught in this module
    """The processes have ended because one of them has failed.

    Args:
        error: what the agent knows.
        world_size: processes on all nodes.
        folder: in which they have written where they were. It is read at once.
    """

    def __init__(self, error: ChildFailedError, world_size: int, folder: str) -> None:
        super().__init__()
        rank, failure = min(error.failures.items(), key=_comes_first)
        self._rank, self._failure, self._world_size = rank, failure, world_size
        self._exit_code = failure.exitcode
        if self._exit_code in _ENDED_BY_SIGTERM and "time_s" in failure.error_file_data:
            # It was on its way out when the agent saw one that has failed in consequence, and ended all.
            self._exit_code = int(failure.error_file_data.get("exit_code", 1))
        self._where = _at(folder, failure.pid)
        # The agent sees who ends first. Who kept that one waiting, it has found out itself; and one that hangs is ended
        # by the others' report.
        self._waited_for: dict[str, Any] | None = failure.error_file_data.get("first") or _blamed(
            folder, failure.pid, rank
        )
        culprit = rank if self._waited_for is None else int(self._waited_for["rank"])
        self.local_rank = failure.local_rank + culprit - rank
        """Whose fault it was."""

    @property
    def exit_status(self) -> int:
        """What a shell would call it: the exit code, or 128 + signal."""
        return self._exit_code if self._exit_code > 0 else 128 - self._exit_code

    def report(self, then: str) -> str:
        """What is known of the rank that failed first: its own traceback, its exit code or its signal."""
        if self._waited_for is not None:
            shown = _shown(self._waited_for["rank"], self._waited_for["trace"].splitlines() or ["an unknown place"])
            return f"{self._waited_for['charge']}; {then}. There it stood:\n{shown}"
        rank, failure = self._rank, self._failure
        trace = _trace(failure)
        if self._exit_code < 0:
            how = f"was killed by {failure.signal_name()}"
        elif trace:
            how = "failed"
        else:
            how = f"ended with exit code {self._exit_code}"
        lines = trace.rstrip().splitlines()
        if not lines:
            why = " Nobody sent it? Then the kernel did, when memory ran out." if failure.exitcode == -9 else ""
            lines = [f"{how} and left no Python traceback; if it printed one, it is further up.{why}"]
        who = f"rank {rank} of {self._world_size} (process {failure.pid})"
        return f"{who} {how} first{self._where}; {then}. Its own report:\n{_shown(rank, lines)}"


def _shown(rank: int, lines: Sequence[str]) -> str:
    return "\n".join(f"[rank{rank}]: {line}" for line in lines)


def _attempt(folder: str, pid: int) -> tuple[Path, Position] | None:
    """The folder of the attempt to which that process belongs, and where it was last; None where it has not said."""
    for attempt in Path(folder).glob("*/attempt_*"):
        for position in read_positions(str(attempt)).values():
            if position.pid == pid:
                return attempt, position
    return None


def _at(folder: str, pid: int) -> str:
    """Where that process was last, as a part of a sentence; "" where it has not said."""
    found = _attempt(folder, pid)
    return "" if found is None else f", at {found[1]}"


def _blamed(folder: str, pid: int, rank: int) -> dict[str, Any] | None:
    """What another process of the same attempt has written of ``rank``, for which it had waited; None if nothing."""
    found = _attempt(folder, pid)
    for file in () if found is None else found[0].glob("*/error.json"):
        with contextlib.suppress(OSError, ValueError):
            first = json.loads(file.read_text(encoding="utf-8")).get("first")
            if first and first["rank"] == rank:
                return cast("dict[str, Any]", first)
    return None


def _trace(failure: ProcessFailure) -> str:
    """What the rank has written down, in the layout of torch's error files; "" if it has not."""
    message = cast("dict[str, Any] | str", failure.error_file_data.get("message", ""))
    return "" if isinstance(message, str) else str(message.get("extraInfo", {}).get("py_callstack", ""))


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
