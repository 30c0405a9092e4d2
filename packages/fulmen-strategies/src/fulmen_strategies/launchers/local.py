"""The local launcher: a plain script's own process stays rank 0, the node's other ranks run the script once more."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, TypeVar

import torch

from fulmen_protocols.errors import BackendUnavailable, MisconfigurationException, RankFailure
from fulmen_strategies._marks import LAUNCHED, process_exists
from fulmen_strategies.environments._table import is_launched, number
from fulmen_strategies.launchers._command import program_again
from fulmen_strategies.launchers._other_hosts import is_told
from fulmen_strategies.launchers._rank import become_rank
from fulmen_strategies.launchers._world import Request, World, refuse_other_request

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LocalLauncher"]

T = TypeVar("T")

# The processes belong to the program, not to a launcher: they run the script from its first line to its last, so two
# launchers (of two trainers, say) must find the same ones.
_world: World | None = None
_world_lock = threading.Lock()


class LocalLauncher:
    """Starts the other processes of this node by running the program again, and watches them.

    When one of them fails, all end within seconds: ``launch`` raises RankFailure if the main thread comes out of its
    function in time; otherwise this process is stopped, with the failed rank's exit status (128 + signal if it was
    killed). Either way the last lines on the terminal are that rank's own traceback. An error that rank 0 raises itself
    passes unchanged, and ends the others when nobody catches it. At the end of the program rank 0 waits for the others.

    A process that this launcher (FULMEN_LAUNCHED) or another one (LOCAL_RANK and WORLD_SIZE) has started just runs
    the function.
    """

    @property
    def is_interactive_compatible(self) -> bool:
        """False: a notebook is no program that could be run again."""
        return False

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
        """Make ``num_processes`` processes on this node, run ``function`` in this one and return its value.

        Raises:
            RankFailure: another process failed first; the message carries its traceback.
            MisconfigurationException: an earlier launch had other arguments, or there is no program to run again.
            BackendUnavailable: on Windows, which has no process groups.
        """
        asked = Request(num_processes, num_nodes, node_rank, main_address, main_port)
        if is_launched(os.environ, os.getppid(), process_exists):
            become_rank()
            if LAUNCHED in os.environ:
                _compare_with_environment(asked)
            return function()
        if num_processes == 1:
            return function()
        world = _world_for(asked)
        try:
            return function()
        except BaseException as error:
            failure = world.settle(error)
            if failure is None:
                raise
            told = RankFailure(str(failure))
            is_told(told)
            raise told from error

    def kill(self, signum: int) -> None:
        """Send ``signum`` to every process that this one has started and that still lives."""
        if _world is not None:
            _world.signal(signum)


def _world_for(asked: Request) -> World:
    global _world
    with _world_lock:
        if _world is not None:
            refuse_other_request(_world.request, asked)
            _world.resume()
            return _world
        if sys.platform == "win32":
            raise BackendUnavailable(
                f"{asked.num_processes} processes were asked for, but the local launcher needs POSIX process groups: "
                "start the program with torchrun."
            )
        threads = max(1, _usable_cpus() // asked.num_processes)
        world = World(asked, program_again(), threads)
        world.start()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        _world = world
        return world


def _compare_with_environment(asked: Request) -> None:
    started = number(os.environ, "WORLD_SIZE", default=asked.world_size)
    if asked.num_processes > 1 and asked.world_size != started:
        raise MisconfigurationException(
            f"this program runs in {started} processes, and cannot launch {asked.world_size} besides: use the same "
            "devices and num_nodes throughout."
        )


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
