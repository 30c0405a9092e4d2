"""The process that writes snapshots. It imports no torch, and ends when the process that started it does."""

from __future__ import annotations

import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from fulmen_checkpoint import _archive, _local, _shard_file
from fulmen_checkpoint._fetch import storage_errors
from fulmen_checkpoint._shard_file import Record
from fulmen_protocols.errors import FulmenError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from typing import IO

    from fulmen_checkpoint._shard_file import Frame, Written

__all__ = ["Outcome", "Place", "Request", "ShardRequest", "main", "receive", "send"]

_HEADER = struct.Struct("<Q")
_LOOK_AROUND_S = 2.0
# Training keeps its cores: the writer has the time that is left, and on busy cores about a tenth.
_NICENESS = 10


class Place(NamedTuple):
    """Where a file goes."""

    path: str
    local: str | None
    """The absolute path, if it is on this machine."""
    options: Mapping[str, object]
    """Of the storage, for other places."""


class Request(NamedTuple):
    """One checkpoint to write. Spans are (offset, size) in the buffer that comes with it, in bytes."""

    place: Place
    pickle: tuple[int, int]
    storages: list[tuple[int, int]]
    frame: Frame

    @property
    def target(self) -> str:
        """What is named in errors."""
        return self.place.path


class ShardRequest(NamedTuple):
    """A rank's file of a checkpoint that is a folder. Spans are as those of ``Request``."""

    target: str
    """The folder."""
    place: Place
    records: list[tuple[bytes, tuple[int, int]]]
    """Pickle and span of each tensor."""
    frame: Frame


class Outcome(NamedTuple):
    """What became of a request."""

    error: FulmenError | None
    """As ``TorchCheckpointIO`` would raise it; None when the file is visible."""
    written: Written | None = None
    """Of a ``ShardRequest``."""


def send(connection: socket.socket, message: Request | ShardRequest | Outcome, handle: int | None = None) -> None:
    """Send one message, with a file descriptor if given."""
    payload = pickle.dumps(message)
    header = _HEADER.pack(len(payload))
    if handle is None:
        connection.sendall(header)
    else:
        socket.send_fds(connection, [header], [handle])
    connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[object, int | None]:
    """The next message and its file descriptor.

    Raises:
        EOFError: the other side is gone.
    """
    try:
        header, handles, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
        header += _exactly(connection, _HEADER.size - len(header)) if header else b""
    except ConnectionError as error:
        raise EOFError from error
    if not header:
        raise EOFError
    message = pickle.loads(_exactly(connection, _HEADER.unpack(header)[0]))
    return message, handles[0] if handles else None


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        try:
            block = connection.recv(min(size - len(parts), 1 << 20))
        except ConnectionError as error:
            raise EOFError from error
        if not block:
            raise EOFError
        parts += block
    return bytes(parts)


def main(handle: int, parent: int) -> None:
    """Write what is asked for through the socket ``handle`` until it closes or ``parent`` is gone."""
    # Signals to the whole job are the trainer's business: it still needs what is being written.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(_NICENESS)
    with socket.socket(fileno=handle) as connection:
        # A worker that the trainer forked holds the socket open after the trainer's death.
        while os.getppid() == parent:
            if not select.select([connection], [], [], _LOOK_AROUND_S)[0]:
                continue
            try:
                message, buffer = receive(connection)
            except EOFError:
                return
            if buffer is None:
                return
            assert isinstance(message, (Request, ShardRequest))
            outcome = _answer(message, buffer)
            try:
                send(connection, outcome)
            except OSError:
                return


def _answer(request: Request | ShardRequest, buffer: int) -> Outcome:
    try:
        with storage_errors(request.target, "written"):
            try:
                return Outcome(None, _write(request, buffer))
            finally:
                os.close(buffer)
    except FulmenError as error:
        error.__cause__ = error.__context__ = None  # their frames would keep the buffer in use
        return Outcome(error.with_traceback(None))


def _write(request: Request | ShardRequest, buffer: int) -> Written | None:
    size = os.fstat(buffer).st_size
    if isinstance(request, ShardRequest):
        spans = [span for _, span in request.records]
    else:
        spans = [request.pickle, *request.storages]
    # Nobody closes it: where writing fails, frames of the error still look into it, and what closed it would fail too.
    memory = memoryview(mmap.mmap(buffer, size, prot=mmap.PROT_READ))
    views = [memory[offset : offset + count] for offset, count in spans]
    with _sink(request.place) as sink:
        if isinstance(request, ShardRequest):
            records = [Record(data, view) for (data, _), view in zip(request.records, views, strict=True)]
            return _shard_file.write(sink, records, request.frame)
        head = [("data.pkl", bytes(views[0])), *request.frame.head]
        _archive.write(sink, _archive.Parts(head, views[1:], request.frame.tail))
        return None


def _sink(place: Place) -> AbstractContextManager[IO[bytes]]:
    if place.local is not None:
        return _local.write_atomic(place.local)
    from fulmen_checkpoint.storage import FsspecStorage  # fsspec is slow to import, and local files need none of it

    return FsspecStorage(place.options).write_atomic(place.path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
