"""Storage: where bytes live. The smallest part of a file system that checkpoints need; fsspec supplies ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import IO

__all__ = ["Storage"]


@runtime_checkable
class Storage(Protocol):
    """Files by URL. Paths are absolute or carry a protocol (``s3://bucket/key``)."""

    def open_read(self, path: str) -> AbstractContextManager[IO[bytes]]:
        """A seekable stream of the file's bytes. Raises ``FileNotFoundError``."""
        ...

    def write_atomic(self, path: str) -> AbstractContextManager[IO[bytes]]:
        """A stream whose bytes appear at ``path`` in one step when the block ends without an error.

        Until then, and after an error, ``path`` keeps what it held. On return the bytes survive a power failure as far
        as the storage can promise it. Parent folders are made.
        """
        ...

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        ...

    def list(self, path: str) -> list[str]:
        """Full paths of the entries of a folder, sorted; empty when there is none."""
        ...

    def modified(self, path: str) -> float:
        """Seconds since the epoch when the file was last written. Raises ``FileNotFoundError``."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file or folder with all it holds. Removing what is not there is allowed."""
        ...
