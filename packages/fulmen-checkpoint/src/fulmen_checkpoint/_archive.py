"""Writes a torch file from its parts, with one checksum of each byte, and without importing torch.

A process that only writes starts at once without torch. And ``torch.save`` would compute a CRC-32 of every byte for the
zip archive's records, where the file's digest needs one too: both come from the same pass here, beside the write.
"""

from __future__ import annotations

import hashlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, NamedTuple

from fulmen_checkpoint import _crc, _digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future

__all__ = ["Parts", "write"]

_BLOCK_BYTES = 8 << 20
# Smaller records are gathered into one write.
_GATHER_BYTES = 1 << 16
# torch puts the bytes of every record at such a multiple, by padding in the header's extra field, and maps them there.
_ALIGNMENT = 64
_PADDING_MARK = b"FB"

# The zip format, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3: the structures' fields in order.
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR_64 = struct.Struct("<4sL2Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_LIMIT = 0xFFFFFFFF
_MOST_ENTRIES = 0xFFFF
_VERSION, _VERSION_64 = 20, 45
_MADE_ON_UNIX = 3 << 8
_MODE = 0o600 << 16
_SIZES_FOLLOW = 1 << 3  # in a descriptor after the data: a stream cannot go back to the header
_FIRST_OF_1980 = 1 << 5 | 1


class Parts(NamedTuple):
    """What torch would write, in the order in which it does."""

    head: Sequence[tuple[str, bytes]]
    """Records before the storages, by name: the pickle is ``data.pkl`` and comes first."""
    storages: Iterable[memoryview]
    """The bytes of each, which must stay valid until the next one is asked for."""
    tail: Sequence[tuple[str, bytes]]
    """Records after them."""


class _Entry(NamedTuple):
    """A record that was written."""

    name: bytes
    crc: int
    size: int
    start: int
    """Of its header, in bytes from the start of the file."""


def write(sink: IO[bytes], parts: Parts) -> None:
    """Write the whole file, digest included.

    Raises:
        Exception: what the sink raised.
    """
    with ThreadPoolExecutor(1, "fulmen-digest") as helper:
        archive = _Archive(sink, helper)
        for name, content in parts.head:
            archive.add(name, memoryview(content))
        for key, storage in enumerate(parts.storages):
            archive.add(f"data/{key}", storage)
        for name, content in parts.tail:
            archive.add(name, memoryview(content))
        archive.finish()


class _Archive:
    """A zip archive of records that are not compressed."""

    def __init__(self, sink: IO[bytes], helper: ThreadPoolExecutor) -> None:
        self._sink = sink
        self._helper = helper
        self._beside = _has_free_core()
        """Whether checksums are computed while the bytes before them are written, and not in turns."""
        self._chunks = _digest.Chunks()
        self._gathered = bytearray()
        self._entries: list[_Entry] = []

    def add(self, name: str, content: memoryview) -> None:
        """Write one record."""
        encoded = f"archive/{name}".encode("ascii")
        start, size = self._position(), content.nbytes
        self._gathered += _local_header(encoded, start, size)
        if size < _GATHER_BYTES:
            crc = _crc.crc32(content, 0)
            self._gathered += content
        else:
            self._flush()
            crc = 0
            for offset in range(0, size, _BLOCK_BYTES):
                crc = self._pass_on(content[offset : offset + _BLOCK_BYTES], crc)
        if _is_large(size):
            self._gathered += _DESCRIPTOR_64.pack(b"PK\7\x08", crc, size, size)
        else:
            self._gathered += _DESCRIPTOR.pack(b"PK\7\x08", crc, size, size)
        self._entries.append(_Entry(encoded, crc, size, start))
        if len(self._gathered) > _GATHER_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what ends the file."""
        checksums = b"".join(entry.crc.to_bytes(4, "little") for entry in self._entries)
        number = int.from_bytes(hashlib.sha256(checksums).digest()[:16], "little")
        self.add(".data/serialization_id", memoryview(f"{number:040d}".encode()))
        start = self._position()
        for entry in self._entries:
            self._gathered += _directory_entry(entry)
        size, count = self._position() - start, len(self._entries)
        if count >= _MOST_ENTRIES or start >= _LIMIT or size >= _LIMIT:
            place = self._position()
            self._gathered += _END_64.pack(
                b"PK\6\6", _END_64.size - 12, _VERSION_64, _VERSION_64, 0, 0, count, count, size, start
            )
            self._gathered += _LOCATOR_64.pack(b"PK\6\7", 0, place, 1)
            count, size, start = min(count, _MOST_ENTRIES), min(size, _LIMIT), min(start, _LIMIT)
        self._gathered += _digest.END.pack(b"PK\5\6", 0, 0, count, count, size, start, _digest.COMMENT_BYTES)
        self._flush()
        self._sink.write(self._chunks.comment())

    def _position(self) -> int:
        return self._chunks.size + len(self._gathered)

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, bytearray()
        if gathered:
            self._chunks.add(memoryview(gathered))
            self._sink.write(gathered)

    def _pass_on(self, block: memoryview, crc: int) -> int:
        """Write a block; returns the checksum of its record up to there."""
        pieces = list(self._chunks.split(block))
        for piece, piece_crc in zip(pieces, self._written(block, pieces), strict=True):
            self._chunks.add_crc(piece_crc, piece.nbytes)
            crc = _crc.joined(crc, piece_crc, piece.nbytes)
        return crc

    def _written(self, block: memoryview, pieces: Sequence[memoryview]) -> Sequence[int]:
        """Write a block; returns the checksum of each of its pieces."""
        found: list[int] = []
        if not self._beside:
            for piece in pieces:  # what the checksum has read is in the cache when it is written
                found.append(_crc.crc32(piece, 0))
                self._sink.write(piece)
            return found
        # Checksum and file release the GIL.
        sums: list[Future[int] | None] = [self._begin(piece) for piece in pieces]
        self._sink.write(block)
        for piece, sum_ in zip(reversed(pieces), reversed(sums), strict=True):
            # What the other thread has not begun is done here: nobody waits for a core that others have taken.
            found.append(_crc.crc32(piece, 0) if sum_ is None or sum_.cancel() else sum_.result())
        return found[::-1]

    def _begin(self, piece: memoryview) -> Future[int] | None:
        try:
            return self._helper.submit(_crc.crc32, piece, 0)
        except RuntimeError:  # the interpreter is shutting down and starts no threads any more
            return None


def _has_free_core() -> bool:
    cores = os.cpu_count() or 1
    return cores > 1 and (not hasattr(os, "getloadavg") or os.getloadavg()[0] < cores)


def _is_large(size: int) -> bool:
    return size > _LIMIT >> 1


def _local_header(name: bytes, start: int, size: int) -> bytes:
    large = _is_large(size)
    # Where sizes follow the data, these are 0 here.
    extra = struct.pack("<2H2Q", 1, 16, 0, 0) if large else b""
    padding = -(start + _LOCAL.size + len(name) + len(extra) + 4) % _ALIGNMENT
    extra = _PADDING_MARK + padding.to_bytes(2, "little") + b"Z" * padding + extra
    told = _LIMIT if large else 0
    version = _VERSION_64 if large else _VERSION
    fixed = _LOCAL.pack(
        b"PK\3\4", version, _SIZES_FOLLOW, 0, 0, _FIRST_OF_1980, 0, told, told, len(name), len(extra)
    )  # fmt: skip
    return fixed + name + extra


def _directory_entry(entry: _Entry) -> bytes:
    large: list[int] = []
    size = start = _LIMIT
    if _is_large(entry.size):
        large += [entry.size, entry.size]
    else:
        size = entry.size
    if entry.start >= _LIMIT:
        large.append(entry.start)
    else:
        start = entry.start
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    version = _VERSION_64 if large else _VERSION
    fixed = _CENTRAL.pack(
        b"PK\1\2", _MADE_ON_UNIX | version, version, _SIZES_FOLLOW, 0, 0, _FIRST_OF_1980, entry.crc, size, size,
        len(entry.name), len(extra), 0, 0, 0, _MODE, start,
    )  # fmt: skip
    return fixed + entry.name + extra
