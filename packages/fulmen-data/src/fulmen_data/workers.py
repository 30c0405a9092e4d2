"""How many processes may load data on this machine."""

from __future__ import annotations

import os

from fulmen_protocols import MisconfigurationException

__all__ = ["suggested_max_num_workers"]


def suggested_max_num_workers(local_world_size: int) -> int:
    """The most workers a ``DataLoader`` of each process should have, at least 1.

    The cores that this process may run on are shared by the ``local_world_size`` processes of this machine, and each
    keeps one core for itself.

    Raises:
        ValueError: there is no process.
    """
    if local_world_size < 1:
        raise MisconfigurationException(
            f"local_world_size={local_world_size!r} must be at least 1: it is the number of processes on this machine."
        )
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = os.cpu_count() or 1 if affinity is None else len(affinity(0))
    return max(1, cores // local_world_size - 1)
