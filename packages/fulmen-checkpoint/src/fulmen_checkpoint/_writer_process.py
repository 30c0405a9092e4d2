"""The trainer's side of the writing process: started at the first request, started again if it was killed."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fulmen_protocols
from fulmen_checkpoint._writer_main import Outcome, Request, receive, send
from fulmen_protocols.errors import CheckpointError

__all__ = ["WriterProcess", "is_possible"]

_log = logging.getLogger("fulmen_checkpoint")
_END_S = 5.0
_ATTEMPTS = 3
_START = "import sys; sys.path[:] = {path!r}; from fulmen_checkpoint._writer_main import main; main({fd}, {parent})"


def is_possible() -> bool:
    """Whether this Python can start another one and hand it open files."""
    return hasattr(socket, "send_fds") and bool(sys.executable) and not getattr(sys, "frozen", False)


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

    def write(self, request: Request, buffer: int) -> Outcome:
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
                return Outcome(*answer)  # type: ignore[arg-type]  # what the writer sent
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
