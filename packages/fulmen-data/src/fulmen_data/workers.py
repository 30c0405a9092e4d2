"""The processes that load data: how many there may be on this machine, and how they end."""

from __future__ import annotations

import os
from typing import Any

from fulmen_data.fast_forward import FastForward
from fulmen_protocols import MisconfigurationException

__all__ = ["end_workers", "shut_down", "suggested_max_num_workers"]


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


def end_workers(loader: Any) -> None:
    """End, now, the processes that ``loader`` keeps between epochs (``persistent_workers=True``), if it has any.

    The garbage collector is no substitute: of objects in a cycle, as those around a Trainer are, it closes the queues
    first, so that workers never hear that they shall end, and the program stands still for five seconds for each.
    """
    if isinstance(loader, FastForward):
        end_workers(loader.loader)
        return
    if shut_down(getattr(loader, "_iterator", None)):
        loader._iterator = None


def shut_down(iterator: object) -> bool:
    """End the workers of a ``DataLoader``'s iterator; says whether that is what ``iterator`` is."""
    end = getattr(iterator, "_shutdown_workers", None)
    if end is None:
        return False
    end()
    return True
