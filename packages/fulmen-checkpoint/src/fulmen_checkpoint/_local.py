"""Atomic files on a local or mounted file system: stage beside the target, flush to disk, rename, flush the folder."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, cast

from fulmen_checkpoint.names import stages, staging_name, this_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from _typeshed import ReadableBuffer

if sys.platform != "win32":
    import fcntl

__all__ = ["remove_folder", "sweep", "write_atomic"]

# A staging file of another machine (a shared file system) is nobody's after a day without a single write to it.
_ABANDONED_S = 86400.0
_EAGER_BYTES = 16 << 20
_SYNC_FILE_RANGE_WRITE = 2  # begin to write what is changed, and wait for nothing


@contextmanager
def write_atomic(path: str) -> Generator[IO[bytes]]:
    """See ``Storage.write_atomic``; ``path`` is absolute."""
    folder, name = os.path.split(path)
    if os.path.isdir(path) and not os.path.islink(path):
        raise IsADirectoryError(errno.EISDIR, "a folder is where the file should be written; remove it first", path)
    created = _make_folders(folder)
    sweep(folder, name)
    staging = os.path.join(folder, staging_name(name))
    # "x": a name nobody has. The mode follows the umask, as for any file; tempfile would make it 0600.
    stream = io.BufferedWriter(_EagerFile(staging, "xb"))  # closed below, before the rename
    try:
        with stream:
            if sys.platform != "win32":
                # Held for as long as this process lives: tells a sweeper that the file is being written.
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staging, path)
    except BaseException:
        with suppress(OSError):
            os.remove(staging)
        raise
    for changed in (folder, *created):
        _fsync_folder(changed)


class _EagerFile(io.FileIO):
    """A file whose bytes the disk begins to write while more are added: less is left for the fsync at the end."""

    def __init__(self, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._written = 0
        self._sent = 0

    def write(self, data: ReadableBuffer, /) -> int:
        count = super().write(data)
        self._written += count
        if self._written - self._sent >= _EAGER_BYTES and _sync_file_range is not None:
            # A hint: whether the bytes got there is what the fsync tells.
            _sync_file_range(self.fileno(), self._sent, self._written - self._sent, _SYNC_FILE_RANGE_WRITE)
            self._sent = self._written
        return count


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    found: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int] | None", found)


_sync_file_range = _find_sync_file_range()


def remove_folder(path: str) -> None:
    """Delete a folder with all it holds; it disappears in one step. One that is gone already is allowed."""
    parent, name = os.path.split(path)
    staging = os.path.join(parent, staging_name(name))
    try:
        os.rename(path, staging)
    except FileNotFoundError:
        return
    except OSError:  # a mount point, or a parent that may not be changed
        staging = path
    with suppress(FileNotFoundError):
        shutil.rmtree(staging)


def sweep(folder: str, name: str) -> list[str]:
    """Delete what killed writers of ``folder/name`` left behind, and return the paths deleted.

    A staging file is deleted when no process can be writing it: on this machine its writer is dead and nobody holds its
    lock; on another machine it has not been written for a day.
    """
    swept: list[str] = []
    try:
        entries = [entry for entry in os.scandir(folder) if stages(entry.name, name) is not None]
    except OSError:
        return swept
    for entry in entries:
        staged = stages(entry.name, name)
        if staged is None:
            continue
        with suppress(OSError):  # another process may sweep the same file
            if staged.machine == this_machine():
                dead = not _is_running(staged.pid) and not _is_locked(entry.path)
            else:
                dead = time.time() - entry.stat().st_mtime > _ABANDONED_S
            if dead:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.remove(entry.path)
                swept.append(entry.path)
    return swept


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_locked(path: str) -> bool:
    # The process id may be one of another container; the kernel, and so the lock, is the same.
    if sys.platform == "win32":
        return False
    if os.path.isdir(path):
        return False
    with open(path, "rb") as stream:
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _make_folders(folder: str) -> list[str]:
    """Make ``folder``; return the folders that gained an entry by it, which must be flushed too."""
    gained: list[str] = []
    missing = folder
    while not os.path.isdir(missing):
        parent = os.path.dirname(missing)
        if parent == missing:
            break
        gained.append(parent)
        missing = parent
    os.makedirs(folder, exist_ok=True)
    return gained


def _fsync_folder(folder: str) -> None:
    if sys.platform == "win32":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # FUSE file systems that flush folders by themselves
            raise
    finally:
        os.close(handle)
