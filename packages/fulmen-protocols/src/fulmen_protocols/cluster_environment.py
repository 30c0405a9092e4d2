"""ClusterEnvironment: what a scheduler or launcher tells a process about its place. Member names are Lightning's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from signal import Signals

__all__ = ["ClusterEnvironment", "SupportsRequeue"]


@runtime_checkable
class ClusterEnvironment(Protocol):
    """Reads ranks and the meeting point from the environment of the process. Pure: never writes to it.

    A class that derives from this one may leave out ``validate_settings``.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """Whether somebody else (torchrun, SLURM, our own launcher) has already started every process."""
        ...

    @property
    def main_address(self) -> str:
        """Host of rank 0."""
        ...

    @property
    def main_port(self) -> int:
        """Port on that host; the same value on every later read."""
        ...

    @staticmethod
    def detect() -> bool:
        """Whether this process runs in such an environment."""
        ...

    def world_size(self) -> int:
        """Number of processes; 1 where nobody has started others."""
        ...

    def global_rank(self) -> int:
        """Index among all processes."""
        ...

    def local_rank(self) -> int:
        """Index among the processes of this node."""
        ...

    def node_rank(self) -> int:
        """Index of this node."""
        ...

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare what the user asked for with what the environment started.

        Raises:
            ValueError: they contradict each other; the message has both values.
        """
        return  # a body, so that a type checker does not take it for abstract


@runtime_checkable
class SupportsRequeue(Protocol):
    """Ability of a cluster environment: its scheduler announces the end of a job, and can start the job again later.

    A fit in such an environment stops at the announcement, on all ranks at the same step, saves what it needs to go on,
    and asks for its job to be queued again; in the job's next life it goes on from there. Member names of the first two
    are Lightning's.
    """

    @property
    def auto_requeue(self) -> bool:
        """Whether a fit shall do so; False leaves the signal alone."""
        ...

    @property
    def requeue_signal(self) -> Signals | None:
        """What the scheduler sends before it ends the job. None: it sends nothing, so there is nothing to watch."""
        ...

    def requeue(self) -> None:
        """Ask the scheduler to run this job again. Rank 0 calls it, once, after everything is saved.

        It may return after the scheduler has begun to end the job.

        Raises:
            RuntimeError: the scheduler cannot be asked or refuses; the message says what was asked, how it answered,
                and how to do it by hand.
        """
        ...
