"""The trainer's side of the writing process: started at the first request, started again if it was killed."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import fulmen_protocols
from fulmen_checkpoint._writer_main import Outcome, Place, Request, ShardRequest, receive, send
from fulmen_checkpoint.storage import FsspecStorage, is_object_store, local_path
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen_protocols.storage import Storage

__all__ = ["WriterProcess", "place_of"]

_log = logging.getLogger("fulmen_checkpoint")
_END_S = 5.0
_ATTEMPTS = 3
_START = "import sys; sys.path[:] = {path!r}; from fulmen_checkpoint._writer_main import main; main({fd}, {parent})"


def place_of(path: str, storage: Storage) -> Place | None:
    """What to tell another process about ``path``; None if it could not write to the same place."""
    if type(storage) is not FsspecStorage or not _is_possible():
        return None
    local = local_path(path)
    if local is not None:
        return Place(path, local, {})
    options = storage.storage_options
    return Place(path, None, options) if is_object_store(path) and _is_plain(options) else None


def _is_possible() -> bool:
    """Whether this Python can start another one and hand it open files."""
    return hasattr(socket, "send_fds") and bool(sys.executable) and not getattr(sys, "frozen", False)


def _is_plain(options: Mapping[str, object]) -> bool:
    """Whether another process can be told these options; sessions and connections it cannot."""
    try:
        json.dumps(options)
    except (TypeError, ValueError):
        return False
    return True


class WriterProcess:
    """Writes one request after the other in a process of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._given_up = False

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def write(self, request: Request | ShardRequest, buffer: int) -> Outcome:
        """Have ``request`` written; returns when it is visible or has failed.

        A writer that is killed from outside loses nothing, since the snapshot is not its own: a new one does it again.

        Raises:
            CheckpointError: that one and the next ended too.
        """
        self._given_up = False
        code: int | None = None
        if self._process is not None and self._process.poll() is not None:  # killed while it had nothing to do
            self._end()
        for attempt in range(_ATTEMPTS):
            connection = self._start() if self._connection is None else self._connection
            try:
                send(connection, request, buffer)
                answer, _ = receive(connection)
                assert isinstance(answer, Outcome)
                return answer
            except (EOFError, OSError):
                code = self._end()
                if self._given_up:
                    raise CheckpointError(f"writing the checkpoint {request.target!r} was given up.") from None
                if attempt < _ATTEMPTS - 1:
                    _log.warning("the checkpoint writer ended with %s; another one writes %r", code, request.target)
        raise CheckpointError(
            f"the checkpoint {request.target!r} was not written: the writing process ended {_ATTEMPTS} times, the last "
            f"time with {code}. The path keeps what it held; look for an out-of-memory killer, or save "
            "without AsyncCheckpointIO."
        )

    def close(self) -> None:
        """Let the process end and wait for that; between requests this takes milliseconds."""
        self._end()

    def kill(self) -> None:
        """End the process now, whatever it is doing; the thread that waits for it gets an error."""
        self._given_up = True
        process = self._process
        if process is not None:
            process.kill()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            # Not multiprocessing: its spawn runs the user's script again. -S: what site would add is in the path.
            code = _START.format(path=_import_path(), fd=theirs.fileno(), parent=os.getpid())
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", code],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C goes to the terminal's foreground group
                )
            except BaseException:
                ours.close()
                raise
        self._connection = ours
        return ours

    def _end(self) -> int | None:
        """Close the connection, reap the process and return its exit code."""
        connection, process = self._connection, self._process
        self._connection = self._process = None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        try:
            return process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_END_S)
            return None


def _import_path() -> list[str]:
    """Where this process imports from."""
    homes = [str(Path(file).parent.parent) for file in (__file__, fulmen_protocols.__file__)]
    return [*(os.path.abspath(entry) for entry in sys.path if entry), *homes]
