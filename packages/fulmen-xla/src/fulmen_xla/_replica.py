"""Whether the code that runs is one of a run's replicas, which the launcher has started."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["is_running", "running"]

# By thread: the CPU runtime, and TPUs up to v3, run several replicas as threads of one process.
_here = threading.local()


def is_running() -> bool:
    """Whether this thread is a replica."""
    return bool(getattr(_here, "running", False))


@contextmanager
def running() -> Generator[None]:
    """Within the block this thread is a replica."""
    _here.running = True
    try:
        yield
    finally:
        _here.running = False
