"""FsspecStorage: files anywhere fsspec reaches (local folders, S3, GCS, memory, ...), written in one step."""

from __future__ import annotations

import datetime
import os
import shutil
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from fulmen_checkpoint import _fsspec, _local
from fulmen_checkpoint.names import is_staging, staging_name

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from contextlib import AbstractContextManager

    from fulmen_checkpoint._fsspec import FileSystem

__all__ = ["FsspecStorage"]

# In these an object appears when its upload is completed and not before, so the target itself can be written.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "tos", "obs"})


class FsspecStorage:
    """Every URL that fsspec knows. Satisfies ``fulmen_protocols.Storage``.

    How a write becomes visible in one step:

    - local and mounted folders: staging file beside the target, fsync, rename, fsync of the folder;
    - object stores: one upload that is completed at the end of the block and aborted on an error;
    - every other file system: staging file beside the target, then the file system's own move.

    Args:
        storage_options: passed to the fsspec file system: credentials, ``endpoint_url``, and so on.
    """

    def __init__(self, storage_options: Mapping[str, object] | None = None) -> None:
        self.storage_options = dict(storage_options or {})

    def __repr__(self) -> str:
        return f"FsspecStorage({sorted(self.storage_options)})"  # names only: values may be secrets

    def open_read(self, path: str) -> AbstractContextManager[IO[bytes]]:
        """A seekable stream of the file's bytes.

        Raises:
            FileNotFoundError: nothing is there.
        """
        local = local_path(path)
        if local is not None:
            return open(local, "rb")
        fs, inner = _fsspec.resolve(path, self.storage_options)
        return fs.open(inner, "rb")

    def write_atomic(self, path: str) -> AbstractContextManager[IO[bytes]]:
        """A stream whose bytes appear at ``path`` in one step when the block ends without an error."""
        local = local_path(path)
        if local is not None:
            return _local.write_atomic(local)
        fs, inner = _fsspec.resolve(path, self.storage_options)
        if _fsspec.protocols(fs) & _OBJECT_STORES:
            return _upload(fs, inner)
        return _stage_and_move(fs, inner)

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        local = local_path(path)
        if local is not None:
            return os.path.exists(local)
        fs, inner = _fsspec.resolve(path, self.storage_options)
        _forget_listings(fs, inner)
        return fs.exists(inner)

    def list(self, path: str) -> list[str]:
        """Full paths of a folder's entries, sorted; staging files of unfinished writes are not among them."""
        local = local_path(path)
        if local is not None:
            try:
                found = [os.path.join(local, name) for name in os.listdir(local)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        else:
            fs, inner = _fsspec.resolve(path, self.storage_options)
            _forget_listings(fs, inner)
            try:
                names = fs.ls(inner, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            # An object store lists a folder's own marker, and a file when asked for a file.
            own = inner.rstrip("/")
            found = [fs.unstrip_protocol(name.rstrip("/")) for name in names if name.rstrip("/") != own]
        return sorted(entry for entry in found if not is_staging(entry))

    def modified(self, path: str) -> float:
        """Seconds since the epoch when the file was last written."""
        local = local_path(path)
        if local is not None:
            return os.stat(local).st_mtime
        fs, inner = _fsspec.resolve(path, self.storage_options)
        _forget_listings(fs, inner)
        moment = fs.modified(inner)
        if isinstance(moment, datetime.datetime):
            return moment.timestamp() if moment.tzinfo else moment.replace(tzinfo=datetime.UTC).timestamp()
        return float(moment)

    def remove(self, path: str) -> None:
        """Delete a file or folder with all it holds. Removing what is not there is allowed."""
        local = local_path(path)
        if local is not None:
            if os.path.isdir(local) and not os.path.islink(local):
                with suppress(FileNotFoundError):
                    shutil.rmtree(local)
            else:
                with suppress(FileNotFoundError):
                    os.remove(local)
            return
        fs, inner = _fsspec.resolve(path, self.storage_options)
        _forget_listings(fs, inner)
        with suppress(FileNotFoundError):
            if fs.isfile(inner):
                fs.rm_file(inner)
            elif fs.isdir(inner):
                _remove_tree(fs, inner)


def local_path(path: str) -> str | None:
    """The absolute path that ``path`` stands for on this machine's file systems; None for any other URL."""
    for prefix in ("file://", "local://"):
        if path.startswith(prefix):
            return os.path.abspath(path[len(prefix) :])
    if "://" in path or "::" in path:
        return None
    return os.path.abspath(os.path.expanduser(path))


def is_object_store(path: str) -> bool:
    """Whether ``path`` is a URL of a store that every process of every machine sees alike."""
    return "://" in path and "::" not in path and path.partition("://")[0] in _OBJECT_STORES


@contextmanager
def _upload(fs: FileSystem, path: str) -> Generator[IO[bytes]]:
    stream = fs.open(path, "wb")
    try:
        yield stream
        stream.close()
    except BaseException:
        _fsspec.abandon(stream)
        raise
    _forget_listings(fs, path)


@contextmanager
def _stage_and_move(fs: FileSystem, path: str) -> Generator[IO[bytes]]:
    folder, _, name = path.rpartition("/")
    if folder:
        fs.makedirs(folder, exist_ok=True)
    staging = f"{folder}/{staging_name(name)}"
    try:
        with fs.open(staging, "wb") as stream:
            yield stream
        if _fsspec.has_own_move(fs):
            fs.mv(staging, path)
        else:
            # fsspec's generic move expands "*" and "[" in names; these two take them as they are.
            fs.cp_file(staging, path)
            fs.rm_file(staging)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(staging)
        raise


def _remove_tree(fs: FileSystem, path: str) -> None:
    if not set("*?[") & set(path):
        fs.rm(path, recursive=True)
        return
    # rm expands such characters, and would delete the neighbours too.
    for file in fs.find(path):
        fs.rm_file(file)
    with suppress(FileNotFoundError, NotImplementedError):
        fs.rmdir(path)


def _forget_listings(fs: FileSystem, path: str) -> None:
    # Other processes write here too: a cached listing would hide a checkpoint, or show one that is gone.
    fs.invalidate_cache(path)
