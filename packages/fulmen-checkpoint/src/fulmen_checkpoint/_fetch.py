"""A checkpoint's file as a stream of the operating system, and the errors of files that are missing or damaged."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from fulmen_checkpoint import _digest
from fulmen_protocols.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound, FulmenError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Generator

    from fulmen_protocols.storage import Storage

__all__ = ["corrupt", "fetched", "not_found", "storage_errors"]

_COPY_BYTES = 1 << 20


@contextmanager
def fetched(storage: Storage, path: str) -> Generator[IO[bytes]]:
    """The file as a stream; a remote one is fetched once, into a temporary file that is gone afterwards.

    Raises:
        CheckpointNotFound: nothing is there.
        CheckpointError: the storage failed.
        IsADirectoryError: it is a folder.
    """
    with storage_errors(path, "read"):
        try:
            opened = storage.open_read(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise not_found(storage, path) from error
    with opened as stream:
        if _digest.on_disk(stream):
            yield stream
            return
        with tempfile.NamedTemporaryFile(prefix="fulmen-", suffix=".ckpt") as copy:
            with storage_errors(path, "read"):
                try:
                    while block := stream.read(_COPY_BYTES):
                        copy.write(block)
                except FileNotFoundError as error:
                    raise not_found(storage, path) from error
                copy.flush()
                if copy.tell() == 0 and storage.list(path):  # object stores open folders as empty files
                    raise IsADirectoryError(path)
            with open(copy.name, "rb") as local:
                yield local


@contextmanager
def storage_errors(path: str, verb: str) -> Generator[None]:
    """One clear error for whatever a storage raises: each fsspec file system has exceptions of its own.

    Raises:
        CheckpointError: the storage failed.
    """
    try:
        yield
    except FulmenError:
        raise
    except Exception as error:
        if verb == "read" and isinstance(error, IsADirectoryError):
            raise
        kept = "What the path held before is untouched; check" if verb == "written" else "Check"
        done = "written" if verb == "written" else "read"
        raise CheckpointError(
            f"the checkpoint {path!r} cannot be {done}: {type(error).__name__}: {error}. "
            f"{kept} free space, permissions and the connection."
        ) from error


def corrupt(path: str, part: str) -> CheckpointCorrupt:
    """The error for damaged bytes; ``part`` says which."""
    return CheckpointCorrupt(
        f"the checkpoint {path!r} is damaged: {part}. Use an earlier checkpoint, or copy this one again."
    )


def not_found(storage: Storage, path: str) -> CheckpointNotFound:
    """The error for a path where nothing is, with the nearest name that is there."""
    folder = path.rstrip("/").rpartition("/")[0] or "."
    try:
        near = did_you_mean(path, storage.list(folder if "://" in path else os.path.abspath(folder)))
    except Exception:  # noqa: BLE001 - a bucket that is not there cannot be listed; the path is what matters
        near = ""
    return CheckpointNotFound(f"there is no checkpoint at {path!r}.{near} Check the path.")
