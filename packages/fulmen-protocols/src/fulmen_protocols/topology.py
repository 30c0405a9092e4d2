"""Topology: where one process stands among the processes of a run. A value, made once at launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["Topology"]


class Topology(NamedTuple):
    """Ranks, devices and the meeting point of one run, as this process sees them."""

    devices: tuple[torch.device, ...]
    """The devices of this node; the process with ``local_rank`` i uses entry i."""
    rank: int = 0
    """Index among all processes, ``0 <= rank < world_size``."""
    local_rank: int = 0
    """Index among the processes of this node."""
    node_rank: int = 0
    """Index of this node."""
    world_size: int = 1
    """Number of processes of the run."""
    num_nodes: int = 1
    """Number of nodes."""
    main_address: str = "127.0.0.1"
    """Host of rank 0, where the process group meets."""
    main_port: int = 0
    """Port on that host; 0 while no process group is needed."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.devices[self.local_rank]
