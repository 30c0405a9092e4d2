"""ClusterEnvironment: what a scheduler or launcher tells a process about its place. Member names are Lightning's."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["ClusterEnvironment"]


@runtime_checkable
class ClusterEnvironment(Protocol):
    """Reads ranks and the meeting point from the environment of the process. Pure: never writes to it."""

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
        ...
