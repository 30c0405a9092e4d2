"""Launcher: how the processes of a run come to exist when no cluster has started them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Launcher", "LaunchesApart"]

T = TypeVar("T")


@runtime_checkable
class Launcher(Protocol):
    """Starts and watches the processes of this node."""

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether it works from a notebook or a Python prompt."""
        ...

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
        """Make ``num_processes`` processes on this node, run ``function`` in each, and return rank 0's value.

        A launcher that re-executes the script runs ``function`` only in this process; the others reach their own call
        by running the script. Processes live until ``kill`` or the end of the main process, so that a later call
        (``test`` after ``fit``) finds them: launching twice with the same arguments starts nothing new.

        Raises:
            RankFailure: another process ended with an error; the message carries its traceback.
        """
        ...

    def kill(self, signum: int) -> None:
        """Send ``signum`` to every process that this launcher started and that still lives."""
        ...


@runtime_checkable
class LaunchesApart(Protocol):
    """Ability of a launcher: the function runs in new processes, none of them the caller's own, which end with it.

    Of what it does in memory only its return value, rank 0's, comes back, so whoever launches puts everything that
    matters into that. A later launch starts new processes.
    """

    @property
    def start_method(self) -> str:
        """How processes are made: ``"spawn"``, ``"fork"``, ``"forkserver"``, or a word of the launcher's own."""
        ...
