"""Memory that another process can map too, reused from one snapshot to the next."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch

__all__ = ["Buffer"]

# Room for a checkpoint that grows a little, as optimizers' do after their first step.
_SLACK = 16
_PART_BYTES = 64 << 20
_MOST_THREADS = 8


class Buffer:
    """Bytes shared through a file without a name: the kernel frees it with its last user, however that one ends.

    It needs nothing of ``/dev/shm``, whose size containers limit.

    Args:
        size: in bytes; what is allocated is a little more.

    Raises:
        OSError: there is not so much memory.
    """

    def __init__(self, size: int) -> None:
        pages = -(-max(1, size + size // _SLACK) // mmap.PAGESIZE)
        self.size = pages * mmap.PAGESIZE
        self.handle: int | None = None
        if sys.platform == "win32":
            self._map = mmap.mmap(-1, self.size)
        else:
            self.handle = _nameless_file()
            try:
                _allocate(self.handle, self.size)
                # Not populated: pinning does that too, and copies on the CPU do it by several threads.
                self._map = mmap.mmap(self.handle, self.size)
            except BaseException:
                os.close(self.handle)
                raise
        self._pinned = False
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def pin(self) -> None:
        """Lock the pages for CUDA, so that it copies into them at full speed and beside its other work."""
        if not self._pinned:
            torch.cuda.check_error(int(_runtime().cudaHostRegister(self.bytes.data_ptr(), self.size, 0)))
            self._pinned = True

    def storage(self, offset: int, size: int) -> torch.UntypedStorage:
        """A storage of ``size`` bytes at ``offset``, without copying."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8).untyped_storage()
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=offset).untyped_storage()

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        self._map[offset : offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at ``offset``."""
        return self._map[offset : offset + size]

    def close(self) -> None:
        """Give the memory back, as soon as nobody uses it. Calling it twice is allowed."""
        if self._pinned:
            self._pinned = False
            torch.cuda.check_error(int(_runtime().cudaHostUnregister(self.bytes.data_ptr())))
        self.bytes = torch.empty(0, dtype=torch.uint8)
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
        try:
            self._map.close()
        except BufferError:  # a storage still lies in it; the last one to go unmaps it
            del self._map


def _runtime() -> Any:
    """CUDA's own functions, for which torch has no types."""
    return cast("Any", torch.cuda).cudart()


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fulmen-snapshot", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(prefix="fulmen-") as file:
        return os.dup(file.fileno())


def _allocate(handle: int, size: int) -> None:
    # Now, and with an error that can be told; a page that is missing at its first use would end the process.
    os.ftruncate(handle, size)
    if not hasattr(os, "posix_fallocate"):
        return

    def allocate(start: int) -> None:
        os.posix_fallocate(handle, start, min(_PART_BYTES, size - start))

    if size <= _PART_BYTES:
        allocate(0)
        return
    with ThreadPoolExecutor(_MOST_THREADS) as threads:  # the kernel zeroes some 2 GB a second and core
        for _ in threads.map(allocate, range(0, size, _PART_BYTES)):
            pass
