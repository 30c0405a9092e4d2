"""Writes a torch file from its parts without importing torch, so that a process that only writes starts at once."""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_checkpoint._digest import DigestWriter

__all__ = ["Parts", "write"]

_BLOCK_BYTES = 8 << 20
# torch puts the bytes of every record at such a multiple, by padding in the header's extra field, and maps them there.
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_PADDING_MARK = b"FB"


class Parts(NamedTuple):
    """What torch would write, in the order in which it does."""

    head: Sequence[tuple[str, bytes]]
    """Records before the storages, by name: the pickle is ``data.pkl`` and comes first."""
    storages: Sequence[memoryview]
    tail: Sequence[tuple[str, bytes]]
    """Records after them."""


class _Counted(io.RawIOBase):
    """Says where it is, as zipfile asks, but cannot go back."""

    def __init__(self, writer: DigestWriter) -> None:
        self._writer = writer
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: object, /) -> int:
        size = self._writer.write(data)
        if self._writer.error is not None:  # what follows would be dropped
            raise self._writer.error
        self._position += size
        return size


def write(writer: DigestWriter, parts: Parts) -> None:
    """Write the whole file; ``writer.finish()`` is left to the caller.

    Raises:
        OSError: the storage failed.
    """
    stream = _Counted(writer)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.head:
            _record(archive, stream, name, memoryview(content))
        for key, storage in enumerate(parts.storages):
            _record(archive, stream, f"data/{key}", storage)
        for name, content in parts.tail:
            _record(archive, stream, name, memoryview(content))
        checksums = b"".join(info.CRC.to_bytes(4, "little") for info in archive.infolist())
        number = int.from_bytes(hashlib.sha256(checksums).digest()[:16], "little")
        _record(archive, stream, ".data/serialization_id", memoryview(f"{number:040d}".encode()))


def _record(archive: zipfile.ZipFile, stream: _Counted, name: str, content: memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    info.file_size = content.nbytes
    large = content.nbytes * 1.05 > zipfile.ZIP64_LIMIT
    start = stream.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + (_ZIP64_EXTRA_BYTES if large else 0)
    padding = -(start + 4) % _ALIGNMENT
    info.extra = _PADDING_MARK + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as record:
        for offset in range(0, content.nbytes, _BLOCK_BYTES):
            record.write(content[offset : offset + _BLOCK_BYTES])
    info.extra = b""  # the directory at the end needs no padding
