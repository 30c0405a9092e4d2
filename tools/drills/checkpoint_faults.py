"""Storage faults during saves: the last good checkpoint must stay, and an error must say what happened."""

from __future__ import annotations

import errno
import random
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any

from fulmen_checkpoint import FsspecStorage, TorchCheckpointIO
from fulmen_protocols import CheckpointError
from tools.drills.checkpoints import FORMATS, checkpoint
from tools.drills.drill import Attempts, Drill, evenly
from tools.drills.s3 import new_bucket, server
from tools.drills.table import Row

ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    ConnectionResetError("Connection reset by peer"),
    TimeoutError("timed out"),
    RuntimeError("503 Slow Down"),
]


class Faulty(FsspecStorage):
    """Fails in one of its operations, counted over all of them: opening, each write, committing, looking, deleting."""

    def __init__(self, options: dict[str, Any], fault: Exception, countdown: int) -> None:
        super().__init__(options)
        self.fault = fault
        self.countdown = countdown
        self.fired = False

    def tick(self) -> None:
        """Count an operation; raise if it is the one."""
        self.countdown -= 1
        if self.countdown == 0:
            self.fired = True
            raise self.fault

    def open_read(self, path: str) -> AbstractContextManager[IO[bytes]]:
        self.tick()
        return super().open_read(path)

    @contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        self.tick()
        with super().write_atomic(path) as stream:
            yield _Stream(stream, self)  # type: ignore[misc]
            self.tick()
        self.tick()  # the answer to the last request was lost: it is there all the same

    def list(self, path: str) -> list[str]:
        self.tick()
        return super().list(path)

    def remove(self, path: str) -> None:
        self.tick()
        super().remove(path)


class _Stream:
    def __init__(self, stream: IO[bytes], storage: Faulty) -> None:
        self._stream = stream
        self._storage = storage

    def write(self, data: Any) -> int:
        self._storage.tick()
        return self._stream.write(data)


PLACES = ("local", "memory", "S3")
SETTINGS = {f"{kind}, {place}": (kind, place) for place in PLACES for kind in FORMATS}


@contextmanager
def _faults() -> Iterator[Attempts]:
    """Saves over a good checkpoint, of every format at every place, each with one fault."""
    with server() as s3, tempfile.TemporaryDirectory() as temporary:
        places: dict[str, tuple[str, dict[str, Any]]] = {
            "local": (temporary, {}),
            "memory": (f"memory://{uuid.uuid4().hex}", {}),
            "S3": (new_bucket(s3), s3),
        }

        def attempts(setting: str, first: int, count: int) -> Row:
            kind, place = SETTINGS[setting]
            folder, options = places[place]
            path = f"{folder}/{list(FORMATS).index(kind)}.ckpt"
            return _break(setting, kind, path, options, count, random.Random(f"{setting} {first}"))

        yield attempts


def _break(setting: str, kind: str, path: str, options: dict[str, Any], count: int, rng: random.Random) -> Row:
    healthy = TorchCheckpointIO(FsspecStorage(options))
    FORMATS[kind](FsspecStorage(options)).save_checkpoint(checkpoint(1), path)
    notes = {"the old one is there": 0, "the new one is there, with an error": 0, "tolerated": 0}
    wrong = tried = 0
    operations = _operations(kind, path, options)
    while tried < count:
        storage = Faulty(options, rng.choice(ERRORS), rng.randrange(1, operations + 1))
        problem, error = "", None
        try:
            FORMATS[kind](storage).save_checkpoint(checkpoint(2), path)
        except CheckpointError as caught:
            error = caught
            if str(storage.fault) not in str(error) and storage.fault.args[-1] not in str(error):
                problem = f"the error does not tell of {storage.fault!r}: {error}"
        except Exception as caught:  # noqa: BLE001 - an error of another kind is what the drill looks for
            problem = f"{type(caught).__name__} instead of a CheckpointError: {caught}"
        if not storage.fired:
            continue
        tried += 1
        try:
            healthy.verify_checkpoint(path)
            found = healthy.load_checkpoint(path)["epoch"]
        except CheckpointError as lost:
            problem, found = f"the checkpoint is lost: {lost}", 0
        if error is None and not problem and found != 2:
            problem = f"no error, but number {found} is there"
        if problem:
            wrong += 1
            print(f"{setting}, fault {storage.fault!r}: {problem}", file=sys.stderr, flush=True)
        else:
            notes["tolerated"] += error is None
            notes["the old one is there"] += error is not None and found == 1
            notes["the new one is there, with an error"] += error is not None and found == 2
        FORMATS[kind](FsspecStorage(options)).save_checkpoint(checkpoint(1), path)
    return Row("faults", setting, tried, wrong, notes)


def _operations(kind: str, path: str, options: dict[str, Any]) -> int:
    """How many operations a save over an old checkpoint takes."""
    storage = Faulty(options, RuntimeError(), 1 << 40)
    FORMATS[kind](storage).save_checkpoint(checkpoint(1), path)
    return (1 << 40) - storage.countdown


FAULTS = Drill(_faults, lambda count: evenly(list(SETTINGS), count), piece=8, short=27, full=200)
