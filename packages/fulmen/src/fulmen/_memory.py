"""How much memory this process holds, as the system tells without any package."""

from __future__ import annotations

import os

__all__ = ["host_memory_bytes"]

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def host_memory_bytes() -> int | None:
    """Resident memory of this process in bytes; None where the system has no ``/proc``."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * _PAGE
    except OSError:
        return None
