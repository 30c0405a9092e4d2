"""XLAProfiler: marks a run's actions for the profiler of Cloud TPUs."""

from __future__ import annotations

from typing import NoReturn

from fulmen_protocols import MissingPackage

__all__ = ["XLAProfiler"]


class XLAProfiler:
    """A profiler for TPUs, which fulmen does not support yet: making one is an error that says so.

    Args:
        port: of the server that a TPU profiling client connects to.

    Raises:
        MissingPackage: always.
    """

    def __new__(cls, port: int = 9012) -> NoReturn:
        """Refuse, with what would be needed."""
        raise MissingPackage(
            f"XLAProfiler(port={port}) needs torch-xla and fulmen's support for it, the package fulmen-xla, which is "
            "not released yet. When it is: pip install fulmen-xla. Until then use profiler='pytorch' or 'simple'."
        )
