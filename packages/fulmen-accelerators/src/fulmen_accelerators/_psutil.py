"""Counters of the host, read through psutil."""

from __future__ import annotations

from importlib import import_module

from fulmen_protocols import MissingPackage

__all__ = ["host_stats"]


def host_stats(prefixes: tuple[str, str, str]) -> dict[str, float]:
    """Memory, processor and swap use in percent, under the three given names, in that order.

    Raises:
        MissingPackage: psutil is not installed.
    """
    try:
        psutil = import_module("psutil")  # optional, and without type information
    except ImportError as error:
        raise MissingPackage(
            "device stats of the host need psutil, which is not installed: pip install 'fulmen-accelerators[stats]'"
        ) from error
    memory, processor, swap = prefixes
    return {
        memory: float(psutil.virtual_memory().percent),
        processor: float(psutil.cpu_percent()),
        swap: float(psutil.swap_memory().percent),
    }
