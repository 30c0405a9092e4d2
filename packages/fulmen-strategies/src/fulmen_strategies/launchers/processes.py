"""The process launcher: the function runs in new processes of this node, by spawn, fork or fork server."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch

from fulmen_protocols.errors import MisconfigurationException, RankFailure
from fulmen_strategies._marks import process_exists
from fulmen_strategies.environments._table import is_launched
from fulmen_strategies.launchers._apart import Home, Switches, run_rank
from fulmen_strategies.launchers._by_value import ByValue
from fulmen_strategies.launchers._failure import Failure, read_failure
from fulmen_strategies.launchers._rank import become_rank
from fulmen_strategies.launchers._world import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

__all__ = ["ProcessLauncher", "fork_launcher", "forkserver_launcher", "spawn_launcher"]

T = TypeVar("T")

_POLL_S = 0.05
_VERDICT_S = 2.0  # how long a lost connection may wait for the failure that explains it
_TERM_S = 2.0  # between SIGTERM and SIGKILL


class ProcessLauncher:
    """Runs the function in ``num_processes`` new processes, which end with it; rank 0's value comes back.

    Nothing else comes back: what the function changes in memory stays in its processes. When one of them fails, all end
    within seconds, and the error carries that one's traceback.

    Args:
        start_method: ``"spawn"`` starts new interpreters, which import the program and unpickle the function: both must
            allow that. ``"fork"`` copies this process, notebook and all, which must not have used CUDA;
            ``"forkserver"`` copies a clean one, and pickles like spawn.

    Raises:
        MisconfigurationException: this system has no such method.
    """

    def __init__(self, start_method: Literal["spawn", "fork", "forkserver"] = "spawn") -> None:
        known = multiprocessing.get_all_start_methods()
        if start_method not in known:
            raise MisconfigurationException(
                f"start_method={start_method!r}, but on {sys.platform} Python can start processes by "
                f"{' and '.join(known)}: use 'ddp_spawn', or run a script with 'ddp'."
            )
        self._method = start_method
        self._processes: list[BaseProcess] = []

    @property
    def start_method(self) -> str:
        """How processes are made."""
        return self._method

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether it works in a notebook: fork does; the others would have to import it."""
        return self._method == "fork"

    def launch(
        self,
        function: Callable[[], T],
        *,
        num_processes: int,
        num_nodes: int,
        node_rank: int,
        main_address: str,
        main_port: int,
    ) -> T:
        """Run ``function`` in every process and return its value on this node's first rank.

        In one of them, a nested launch just runs the function; so does a launch of one process.

        Raises:
            RankFailure: a process failed first; the message carries its traceback. A ``SystemExit`` of the function is
                raised as such.
            MisconfigurationException: the function cannot be taken to another process, CUDA is in use already, or the
                script launches while it is being imported.
        """
        if is_launched(os.environ, os.getppid(), process_exists):
            become_rank()
            return function()
        if num_processes * num_nodes == 1:
            return function()
        _require_main_guard()
        if self._method == "fork":
            _require_no_cuda()
        request = Request(num_processes, num_nodes, node_rank, main_address, main_port)
        home = Home(tempfile.mkdtemp(prefix="fulmen-"))
        context = multiprocessing.get_context(self._method)
        may_leave = context.Event()
        try:
            self._processes = self._start(context, function, request, home, may_leave)
            with _passing_on(self.kill):
                return cast("T", self._wait(request, home, may_leave))
        finally:
            self._terminate()
            self._processes = []
            shutil.rmtree(home.folder, ignore_errors=True)

    def kill(self, signum: int) -> None:
        """Send ``signum`` to every process that this launcher has started and that still lives."""
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signum)

    def _start(
        self, context: BaseContext, function: Callable[[], object], request: Request, home: Home, may_leave: Any
    ) -> list[BaseProcess]:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cpus // request.num_processes)
        if "OMP_NUM_THREADS" in os.environ:
            threads = torch.get_num_threads()
        inherits = self._method == "fork"
        carried = ByValue((function, None if inherits else Switches.of_this_process()))
        started: list[BaseProcess] = []
        for local_rank in range(request.num_processes):
            variables = request.environment(local_rank, threads)
            # Not daemonic: its data loaders must be able to start workers. It ends by itself when this process does.
            process = cast("Any", context).Process(
                target=run_rank,
                args=(carried, variables, local_rank, threads, home, may_leave),
                name=f"rank{request.first_rank + local_rank}",
            )
            try:
                with _no_collection():
                    process.start()
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                self._processes = started
                raise _cannot_travel(self._method, error) from error
            started.append(process)
        return started

    def _wait(self, request: Request, home: Home, may_leave: Any) -> object:
        ranks = range(request.num_processes)
        while True:
            failures = self._failures(request, home)
            if failures:
                self._raise(self._culprit(failures, request, home), request, home)
            if all(os.path.exists(home.done(rank)) for rank in ranks):
                break
            time.sleep(_POLL_S)
        may_leave.set()
        for process in self._processes:
            process.join(_TERM_S + 1)
        return pickle.loads(Path(home.value).read_bytes())

    def _failures(self, request: Request, home: Home) -> list[Failure]:
        found: list[Failure] = []
        for local_rank, process in enumerate(self._processes):
            exit_code = process.exitcode
            file = home.error(local_rank)
            is_done = os.path.exists(home.done(local_rank))
            if (exit_code is not None and not is_done) or os.path.exists(file):
                rank = request.first_rank + local_rank
                found.append(
                    read_failure(
                        file, rank=rank, world_size=request.world_size, pid=process.pid or 0, exit_code=exit_code
                    )
                )
        return found

    def _culprit(self, failures: list[Failure], request: Request, home: Home) -> Failure:
        """The first failure that no lost connection explains, if it comes to light in time."""
        until = time.monotonic() + _VERDICT_S
        while True:
            first = min(failures, key=lambda failure: (failure.is_consequence, failure.time_s))
            if (not first.is_consequence and first.exit_code is not None) or time.monotonic() > until:
                return first
            time.sleep(_POLL_S)
            failures = self._failures(request, home)

    def _raise(self, failure: Failure, request: Request, home: Home) -> None:
        self._terminate()
        original: BaseException | None = None
        with suppress(Exception):  # what cannot be unpickled here is told by its text
            original = pickle.loads(Path(home.exception(failure.rank - request.first_rank)).read_bytes())
        if isinstance(original, SystemExit):
            raise original
        raise RankFailure(str(failure)) from original

    def _terminate(self) -> None:
        """SIGTERM, then SIGKILL. Their data loading workers end when they find themselves without a parent."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            self.kill(signum)
            until = time.monotonic() + _TERM_S
            for process in self._processes:
                process.join(max(0.0, until - time.monotonic()))


def spawn_launcher() -> ProcessLauncher:
    """Starts new interpreters."""
    return ProcessLauncher("spawn")


def fork_launcher() -> ProcessLauncher:
    """Copies this process."""
    return ProcessLauncher("fork")


def forkserver_launcher() -> ProcessLauncher:
    """Copies a clean process."""
    return ProcessLauncher("forkserver")


@contextmanager
def _passing_on(kill: Callable[[int], None]) -> Generator[None]:
    """Within the block, pass SIGTERM on: the ranks save and stop, and this process ends as they do."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda signum, _: kill(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _no_collection() -> Generator[None]:
    """Within the block, collect no garbage: a fork begins so too, and comes to `run_rank` before it collects any."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _require_main_guard() -> None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise MisconfigurationException(
            "a new process imports this script, and the script launches processes while it is imported. Put what it "
            'does into a function, and call that below: if __name__ == "__main__":'
        )


def _require_no_cuda() -> None:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if in_use or torch.cuda._is_in_bad_fork():  # pyright: ignore[reportPrivateUsage]
        raise MisconfigurationException(
            "start_method='fork' copies this process, but CUDA is in use here, and a copy could not use it. Move no "
            "tensor to a GPU and call nothing of torch.cuda before the launch (in a notebook: restart the kernel), or "
            "run a script with strategy='ddp'."
        )


def _cannot_travel(method: str, error: Exception) -> MisconfigurationException:
    return MisconfigurationException(
        f"start_method={method!r} takes the function with its model, loaders and callbacks to new processes by pickle, "
        f"which refuses: {error}. Define functions and classes at the top of a module and make no lambdas part of "
        "them, or use strategy='ddp' (or 'ddp_fork')."
    )
