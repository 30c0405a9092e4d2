"""The file of one rank's shards: torch files of one tensor each, one after the other. It imports no torch."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, NamedTuple, cast

from fulmen_checkpoint import _archive, _digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Counted", "Frame", "Record", "Written", "write"]


class Frame(NamedTuple):
    """The small records of this torch's files, in their order around the storages."""

    head: list[tuple[str, bytes]]
    tail: list[tuple[str, bytes]]


class Record(NamedTuple):
    """One tensor."""

    pickle: bytes
    content: memoryview
    """Its elements, valid until the next record is asked for."""


class Written(NamedTuple):
    """What was written."""

    size: int
    """In bytes."""
    digest: str
    places: Sequence[tuple[int, int]]
    """Start and length of each record, in bytes."""


class Counted:
    """A stream for writing that keeps checksums of what went through it."""

    def __init__(self, sink: IO[bytes]) -> None:
        self.chunks = _digest.Chunks()
        self._sink = sink

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take ``data`` whole; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self._sink.write(view)
        self.chunks.add(view)
        return len(view)


def write(sink: IO[bytes], records: Iterable[Record], frame: Frame) -> Written:
    """Write the file. Raises what the sink raised."""
    out = Counted(sink)
    places: list[tuple[int, int]] = []
    for record in records:
        start = out.chunks.size
        head = [("data.pkl", record.pickle), *frame.head]
        _archive.write(cast("IO[bytes]", out), _archive.Parts(head, [record.content], frame.tail))
        places.append((start, out.chunks.size - start))
    return Written(out.chunks.size, out.chunks.hexdigest(), places)
