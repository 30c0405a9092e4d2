"""The bytes of TensorBoard's event files: scalars are encoded here, and found again.

protobuf takes 19 µs to encode a row of 20 scalars; what is the same in every row is encoded once, which leaves 6. The
wire format is that of ``Event`` and ``Summary`` in TensorBoard's ``event.proto`` and ``summary.proto``.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, cast

from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboardX.record_writer import RecordWriter  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["EventRecords", "Scalar", "encode_scalars", "float32", "scalars_in"]

Scalar = tuple[int, str, bytes]
"""Step, tag, and the value's four bytes."""

_NAME = ".out.tfevents."
_WALL_TIME, _STEP, _SUMMARY, _VALUE, _TAG, _SIMPLE_VALUE = b"\x09", b"\x10", b"\x2a", b"\x0a", b"\x0a", b"\x15"
_double = struct.Struct("<d").pack
_float = struct.Struct("<f").pack
# The library ships no types.
_event = cast("Callable[..., _Event]", Event)


class _Value(Protocol):
    tag: str
    simple_value: float

    def WhichOneof(self, group: str) -> str | None: ...  # noqa: N802  protobuf's name


class _Summary(Protocol):
    value: Iterable[_Value]


class _Event(Protocol):
    step: int
    summary: _Summary

    def SerializeToString(self) -> bytes: ...  # noqa: N802  protobuf's name
    def ParseFromString(self, data: bytes) -> object: ...  # noqa: N802  protobuf's name


class _Records(Protocol):
    """``tensorboardX.record_writer.RecordWriter``."""

    def write(self, data: bytes) -> object: ...
    def flush(self) -> object: ...
    def close(self) -> object: ...


class EventRecords:
    """One event file, which is made at once.

    Args:
        folder: where it lies.
        suffix: of its name.
    """

    def __init__(self, folder: str, suffix: str) -> None:
        path = f"{os.path.join(folder, 'events')}{_NAME}{int(time.time()):010d}.{socket.gethostname()}{suffix}"
        self._records = cast("_Records", RecordWriter(path))
        self.write(_event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, event: bytes) -> None:
        """Append an event."""
        self._records.write(event)

    def flush(self) -> None:
        """Have everything on the disk."""
        self._records.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._records.close()


def encode_scalars(values: Iterable[tuple[str, float]], step: int, time_s: float) -> bytes:
    """An event that holds ``values`` by tag, of ``step``, ``time_s`` seconds after the epoch."""
    summary = b"".join([part for tag, value in values for part in (_head(tag), float32(value))])
    # A negative number takes ten bytes, as if it had 64 bits and no sign.
    return b"".join(
        (_WALL_TIME, _double(time_s), _STEP, _varint(step % (1 << 64)), _SUMMARY, _varint(len(summary)), summary)
    )


def float32(value: float) -> bytes:
    """The four bytes of ``value``; what is too large for them becomes infinity."""
    try:
        return _float(value)
    except OverflowError:
        return _float(float("inf") if value > 0 else float("-inf"))


@lru_cache(maxsize=4096)
def _head(tag: str) -> bytes:
    """What stands before the four bytes of a value."""
    text = tag.encode("utf-8", "backslashreplace")
    inner = _TAG + _varint(len(text)) + text + _SIMPLE_VALUE
    return _VALUE + _varint(len(inner) + 4) + inner


def _varint(number: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def scalars_in(folder: str) -> frozenset[Scalar]:
    """The scalars in all event files of a folder, those in folders below it not."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return frozenset(
        (event.step, value.tag, float32(value.simple_value))
        for name in names
        if _NAME in name
        for event in _events(os.path.join(folder, name))
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    )


def _events(path: str) -> Iterator[_Event]:
    """The whole events of a file: each is its length, a checksum, its bytes, a checksum."""
    with open(path, "rb") as stream:
        while len(head := stream.read(12)) == 12:
            size = int.from_bytes(head[:8], "little")
            data = stream.read(size + 4)
            if len(data) < size + 4:  # the process was killed while it wrote
                return
            event = _event()
            event.ParseFromString(data[:size])
            yield event
