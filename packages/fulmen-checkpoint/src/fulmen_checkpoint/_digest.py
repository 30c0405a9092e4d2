"""The digest that makes a torch file tell a flipped byte: made while the file is written, of the zip records' own CRCs.

A torch file is a zip archive, and a zip archive ends with a comment. Ours holds the digest of every byte before it: the
SHA-256 of the CRC-32s of the file's 1 MiB chunks. A CRC-32 finds every damage of up to 32 neighbouring bits and misses
any other with probability 2^-32 per chunk; no unsigned digest could protect from intent. Readers of zip archives skip
the comment, so that ``torch.load`` of any version reads the file as it is.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, cast

from fulmen_checkpoint import _crc

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["CHUNK_BYTES", "COMMENT_BYTES", "END", "Chunks", "Damage", "check", "checksums", "has_digest", "on_disk"]

CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 18
END = struct.Struct("<4s4H2LH")  # zip's end of central directory; the last field is the comment's length
_MAGIC = b"fulmen digest 1: sha256 of crc32 per MiB, "
COMMENT_BYTES = len(_MAGIC) + 16 + 1 + 64
_TAIL_BYTES = END.size + COMMENT_BYTES
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, ValueError, struct.error)


class Damage(Exception):
    """The bytes are not those that were written; the message names the part."""


class Chunks:
    """CRC-32 of each full chunk of a stream of bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._crc = 0
        self._room = CHUNK_BYTES
        self._digest = hashlib.sha256()

    def add(self, data: memoryview) -> None:
        """Bytes, whose checksum is computed here."""
        for part in self.split(data):
            self._take(_crc.crc32(part, self._crc), len(part))

    def split(self, data: memoryview) -> Iterator[memoryview]:
        """Parts of the bytes that come next, none of which reaches over the end of a chunk."""
        room = self._room
        while len(data):
            yield data[:room]
            data, room = data[room:], CHUNK_BYTES

    def add_crc(self, crc: int, size: int) -> None:
        """A part of ``split``, ``size`` bytes long, whose CRC-32 is known already."""
        self._take(_crc.joined(self._crc, crc, size), size)

    def add_crcs(self, crcs: Iterable[int]) -> None:
        """Chunks whose CRC-32 is known already."""
        self._digest.update(b"".join(crc.to_bytes(4, "little") for crc in crcs))

    def hexdigest(self) -> str:
        """The digest of all that was added; nothing may be added afterwards."""
        if self._room < CHUNK_BYTES:
            self._end_chunk()
        return self._digest.hexdigest()

    def comment(self) -> bytes:
        """What follows the zip archive's end record."""
        return _comment(self.size, self.hexdigest())

    def _take(self, crc: int, size: int) -> None:
        self.size += size
        self._crc = crc
        self._room -= size
        if self._room == 0:
            self._end_chunk()

    def _end_chunk(self) -> None:
        self.add_crcs([self._crc])
        self._crc, self._room = 0, CHUNK_BYTES


def _comment(size: int, digest: str) -> bytes:
    return _MAGIC + f"{size:016x} {digest}".encode("ascii")


def on_disk(stream: IO[bytes]) -> bool:
    """Whether ``stream`` is a file of the operating system, with a number and a name."""
    return isinstance(stream, io.BufferedReader) and isinstance(cast("object", stream.raw), io.FileIO)


def has_digest(stream: IO[bytes]) -> bool:
    """Whether the file says that it has a digest, right or wrong."""
    return _read_tail(stream)[1] is not None


def check(stream: IO[bytes]) -> bool:
    """Compare a file with its digest, or, when it has none, with the checksums of its zip records.

    Returns:
        False when the file is of another format than zip, about which nothing can be said.

    Raises:
        Damage: the bytes are not those that were written.
    """
    size, comment = _read_tail(stream)
    if comment is None:
        return _check_zip(stream)
    if checksums(stream, 0, size - COMMENT_BYTES).comment() != comment:
        raise Damage(_damaged_part(stream))
    return True


def checksums(stream: IO[bytes], start: int, size: int) -> Chunks:
    """The checksums of ``size`` bytes from ``start``.

    Raises:
        Damage: the stream has fewer.
    """
    if on_disk(stream):
        return _checksums_of_file(stream.fileno(), start, size)
    chunks = Chunks()
    stream.seek(start)
    for block in _blocks(stream, size):
        chunks.add(block)
    return chunks


def _read_tail(stream: IO[bytes]) -> tuple[int, bytes | None]:
    """Size of the file, and its digest comment or None when it has none.

    Raises:
        Damage: the tail can be neither that of a file with a digest nor that of one without.
    """
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        raise Damage("the file is empty")
    stream.seek(0)
    is_zip = stream.read(4) == b"PK\3\4"
    stream.seek(max(0, size - _TAIL_BYTES))
    tail = stream.read(_TAIL_BYTES)
    comment = tail[-COMMENT_BYTES:]
    end = tail[:-COMMENT_BYTES]
    marked = comment.startswith(_MAGIC)
    if len(end) == END.size and end[:4] == b"PK\5\6" and int.from_bytes(end[-2:], "little") == COMMENT_BYTES:
        if marked:
            return size, comment
        # A comment of just our length: one byte of the mark itself was changed.
        raise Damage("the digest at the end of the file")
    if marked:
        raise Damage("the zip archive's end record")
    plain = tail[-END.size :]
    if not is_zip:
        return size, None
    if plain[:4] == b"PK\5\6" and plain[-2:] == b"\0\0":
        return size, None
    stream.seek(0)
    try:
        # A zip archive of someone else's may have a comment of its own, which must end where the file ends.
        with zipfile.ZipFile(stream) as archive:
            if stream.seek(0, os.SEEK_END) and archive.comment and _ends_with_comment(stream, archive.comment):
                return size, None
    except _ZIP_ERRORS:
        pass
    raise Damage(f"the end is missing or overwritten: the file of {size} bytes does not end as a torch file does")


def _ends_with_comment(stream: IO[bytes], comment: bytes) -> bool:
    stream.seek(-(END.size + len(comment)), os.SEEK_END)
    end = stream.read(END.size)
    return end[:4] == b"PK\5\6" and int.from_bytes(end[-2:], "little") == len(comment)


def _check_zip(stream: IO[bytes]) -> bool:
    stream.seek(0)
    if stream.read(4) != b"PK\3\4":
        return False
    stream.seek(0)
    try:
        with zipfile.ZipFile(stream) as archive:
            # torch.serialization.set_crc32_options(False) leaves every checksum 0.
            if any(info.CRC for info in archive.infolist()):
                bad = archive.testzip()
                if bad is not None:
                    raise Damage(f"record {bad!r}")
    except Damage:
        raise
    except Exception as error:  # zipfile's own, and those of each decompressor that a changed byte may call for
        raise Damage(f"the zip archive's structure ({error})") from error
    return True


def _damaged_part(stream: IO[bytes]) -> str:
    """Which record no longer has its checksum, for the message."""
    try:
        _check_zip(stream)
    except Damage as damage:
        return str(damage)
    return "a header, the padding or the directory of the zip archive, or the digest itself"


def _blocks(stream: IO[bytes], size: int) -> Iterable[memoryview]:
    left = size
    while left > 0:
        block = stream.read(min(CHUNK_BYTES, left))
        if not block:
            raise Damage("the file became shorter while it was read")
        left -= len(block)
        yield memoryview(block)


def _checksums_of_file(handle: int, begin: int, size: int) -> Chunks:
    """The checksums of a local file, several spans at a time."""
    span = 64 * CHUNK_BYTES

    def crcs(start: int) -> list[int]:
        # Blocks that stay in the processor's cache, in one buffer: twice as fast as reading chunks into new memory.
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        found: list[int] = []
        for chunk in range(start, min(start + span, begin + size), CHUNK_BYTES):
            crc, offset, end = 0, chunk, min(chunk + CHUNK_BYTES, begin + size)
            while offset < end:
                count = os.preadv(handle, [buffer[: end - offset]], offset)
                if count == 0:
                    raise Damage("the file became shorter while it was read")
                crc = _crc.crc32(buffer[:count], crc)
                offset += count
            found.append(crc)
        return found

    chunks = Chunks()
    chunks.size = size
    starts = range(begin, begin + size, span)
    workers = min(4, os.cpu_count() or 1, len(starts))
    if workers <= 1:
        chunks.add_crcs(crc for start in starts for crc in crcs(start))
    else:
        with ThreadPoolExecutor(workers, "fulmen-digest") as pool:
            for part in pool.map(crcs, starts):
                chunks.add_crcs(part)
    return chunks
