"""Several processes: samplers that give each its part (from fulmen-data), and whether all see the same files."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from fulmen import _files
from fulmen_data import DistributedSamplerWrapper, UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper
from fulmen_data import IndexBatchSamplerWrapper as _IndexBatchSamplerWrapper
from fulmen_fabric import Fabric
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from os import PathLike

__all__ = [
    "DistributedSamplerWrapper",
    "UnrepeatedDistributedSampler",
    "UnrepeatedDistributedSamplerWrapper",
    "_IndexBatchSamplerWrapper",  # Lightning's name
    "is_shared_filesystem",
]

T = TypeVar("T")


class _Ranks(Protocol):
    """What is asked of ``trainer.strategy``."""

    @property
    def world_size(self) -> int: ...
    @property
    def is_global_zero(self) -> bool: ...
    def barrier(self, name: str | None = None) -> None: ...
    def broadcast(self, obj: T, src: int = 0) -> T: ...
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool: ...


def is_shared_filesystem(
    strategy: _Ranks | Fabric, path: str | PathLike[str] | None = None, timeout: float = 3
) -> bool:
    """Whether all processes see the same files below ``path``. Every process must call it; writes a small file.

    Args:
        strategy: ``trainer.strategy``, or a Fabric.
        path: a folder, or a file in it, that exists; None: the working directory. A URL is shared.
        timeout: seconds that a process waits for what rank 0 has written.

    Raises:
        MisconfigurationException: ``path`` does not exist on every process.
    """
    if (path is not None and not _files.is_local(path)) or strategy.world_size == 1:
        return True
    place = Path(_files.absolute(os.getcwd() if path is None else path)).resolve()
    if not _all_say(strategy, strategy.broadcast(place) == place):
        return False
    if not _all_say(strategy, place.exists()):
        raise MisconfigurationException(
            f"is_shared_filesystem(path={str(path)!r}): it does not exist on every process. Give a folder that does."
        )
    mark = (place.parent if place.is_file() else place) / ".fulmen_shared_filesystem"
    mark.unlink(missing_ok=True)
    strategy.barrier("is_shared_filesystem")
    if strategy.is_global_zero:
        mark.touch()
    deadline = time.monotonic() + timeout
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)  # a network file system shows new files late
    found = _all_say(strategy, mark.exists())
    with suppress(OSError):  # another process may be first
        mark.unlink(missing_ok=True)
    return found


def _all_say(ranks: _Ranks | Fabric, decision: bool) -> bool:
    if isinstance(ranks, Fabric):
        return bool(ranks.all_reduce(int(decision), reduce_op="min"))
    return ranks.reduce_boolean_decision(decision)
