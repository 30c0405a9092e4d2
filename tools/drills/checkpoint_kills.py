"""SIGKILLs at random instants of saves over one checkpoint: what was said to be complete must be there, and whole."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from fulmen_checkpoint import AsyncCheckpointIO, FsspecStorage, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_protocols import CheckpointError, CheckpointNotFound
from tools.drills.checkpoints import FORMATS, checkpoint, same
from tools.drills.drill import Attempts, Drill
from tools.drills.s3 import new_bucket, server
from tools.drills.table import Row

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

ASYNC = "torch file, asynchronously"
ASYNC_SHARDS = "folder of shards, asynchronously"
# Setting: format, ranks, whether on S3; and its share of the kills.
SETTINGS = {
    "torch file, local": ("torch file", 1, False, 3),
    "safetensors file, local": ("safetensors file", 1, False, 2),
    "folder of shards, local": ("folder of shards", 1, False, 3),
    "folder of shards of 2 ranks, local": ("folder of shards", 2, False, 2),
    "asynchronous torch file, local": (ASYNC, 1, False, 3),
    "asynchronous folder of shards of 2 ranks, local": (ASYNC_SHARDS, 2, False, 2),
    "torch file, S3": ("torch file", 1, True, 1),
    "folder of shards, S3": ("folder of shards", 1, True, 1),
    "asynchronous torch file, S3": (ASYNC, 1, True, 1),
}


def _shares(count: int) -> dict[str, int]:
    """In proportion; every setting gets one at least, and the sum is ``count`` if that is possible."""
    total = sum(share for *_, share in SETTINGS.values())
    shares = {name: max(1, count * share // total) for name, (*_, share) in SETTINGS.items()}
    shares[next(iter(shares))] += max(0, count - sum(shares.values()))
    return shares


@contextmanager
def _kills() -> Iterator[Attempts]:
    """Processes that save one checkpoint after another to the same place, and are killed meanwhile."""
    with server() as s3, tempfile.TemporaryDirectory() as temporary:
        places: dict[str, tuple[str, dict[str, Any]]] = {}

        def attempts(setting: str, first: int, count: int) -> Row:
            kind, ranks, remote, _ = SETTINGS[setting]
            if setting not in places:
                places[setting] = (new_bucket(s3), s3) if remote else (str(Path(temporary, str(len(places)))), {})
            folder, options = places[setting]
            return _Killing(setting, kind, ranks, f"{folder}/last.ckpt", options, first).run(count)

        yield attempts


class _Killing:
    def __init__(self, setting: str, kind: str, ranks: int, path: str, options: dict[str, Any], first: int) -> None:
        self.setting = setting
        self.path = path
        self.options = options
        self.rng = random.Random(f"{setting} {first}")
        self.command = [sys.executable, "-W", "ignore", "-m", "tools.drills.checkpoint_kills", kind, str(ranks), path]

    def run(self, count: int) -> Row:
        notes = {"old one found": 0, "newer one found": 0}
        wrong = 0
        io = TorchCheckpointIO(FsspecStorage(self.options))
        newest = 0
        with suppress(CheckpointNotFound):  # it is there if an earlier piece was run
            number = io.load_checkpoint(self.path)["epoch"]
            assert isinstance(number, int)
            newest = number
        saver = subprocess.Popen(
            [*self.command, json.dumps(self.options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        with saver:
            assert saver.stdin is not None
            for _ in range(count):
                complete = self._kill(saver, newest)
                problem, newest = self._look(complete)
                if problem:
                    wrong += 1
                    print(f"{self.setting}: {problem}", file=sys.stderr, flush=True)
                    newest = complete
                else:
                    notes["old one found"] += newest == complete
                    notes["newer one found"] += newest > complete
            saver.stdin.close()
        return Row("kills", self.setting, count, wrong, notes)

    def _kill(self, saver: subprocess.Popen[str], number: int) -> int:
        """Start saving after ``number``, kill in the second save or later; returns the last that was said complete."""
        assert saver.stdin is not None
        assert saver.stdout is not None
        saver.stdin.write(f"{number}\n")
        saver.stdin.flush()
        pids: list[int] = []
        writers: set[int] = set()
        begun = 0.0
        while True:
            word, value = saver.stdout.readline().split()
            if word in ("child", "writer"):
                pids.append(int(value))
                writers |= {int(value)} if word == "writer" else set()
            elif word == "begin":
                begun = time.perf_counter()
            elif word == "done":
                number = int(value)
                break
        time.sleep(self.rng.uniform(0, 2 * (time.perf_counter() - begun)))
        self.rng.shuffle(pids)
        # A writing process may be left alone: it ends by itself when its trainer is gone.
        spared = writers if self.rng.random() < 0.5 else set()
        for pid in [pid for pid in pids if pid not in spared]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            time.sleep(self.rng.uniform(0, 0.1) if len(pids) > 1 else 0)
        while True:
            word, value = saver.stdout.readline().split()
            if word == "end":
                return number
            if word == "done":
                number = int(value)

    def _look(self, complete: int) -> tuple[str, int]:
        io = TorchCheckpointIO(FsspecStorage(self.options))
        try:
            io.verify_checkpoint(self.path)
            found = io.load_checkpoint(self.path)
        except CheckpointError as error:
            return str(error), complete
        number = found["epoch"]
        assert isinstance(number, int)
        if number not in (complete, complete + 1):
            return f"number {complete} was complete, but {number} was found", number
        expected = checkpoint(number)
        whole = all(same(found[key], expected[key]) for key in ("state_dict", "optimizer_states", "ranks", "words"))
        return ("" if whole else f"number {number} has other content"), number


def _say(word: str, value: int) -> None:
    os.write(1, f"{word} {value}\n".encode())


def _serve(kind: str, ranks: int, path: str, options: dict[str, Any]) -> None:
    """For each number on stdin: fork savers that begin after it, and wait until they have been killed."""
    # Writing processes of killed savers become children of this one, so that it can wait for their end.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for line in sys.stdin:
        meeting = tempfile.mktemp(prefix="fulmen-drill-")
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _save_on(kind, rank, ranks, meeting, path, options, int(line))
            _say("child", pid)
        with suppress(ChildProcessError):
            while True:
                os.wait()
        with suppress(FileNotFoundError):
            os.remove(meeting)
        _say("end", 0)


def _save_on(kind: str, rank: int, ranks: int, meeting: str, path: str, options: dict[str, Any], number: int) -> None:
    """Save one checkpoint after another, until killed."""
    try:
        if ranks > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        if kind in (ASYNC, ASYNC_SHARDS):
            _save_asynchronously(kind, rank, path, options, number)
        io: Any = FORMATS[kind](FsspecStorage(options))
        while True:
            number += 1
            if rank == 0:
                _say("begin", number)
            (io.save_sharded if ranks > 1 else io.save_checkpoint)(checkpoint(number), path)
            if rank == 0:
                _say("done", number)
    finally:
        os._exit(1)


def _save_asynchronously(kind: str, rank: int, path: str, options: dict[str, Any], number: int) -> NoReturn:
    """As ``_save_on``; a checkpoint is complete when the wait for it is over."""
    inner = ShardedCheckpointIO if kind == ASYNC_SHARDS else TorchCheckpointIO
    io: Any = AsyncCheckpointIO(inner(FsspecStorage(options)))
    save = io.save_sharded if kind == ASYNC_SHARDS else io.save_checkpoint
    save(checkpoint(number), path)  # that the writing process is there before anyone is killed
    io.wait()
    _say("writer", io._process.pid or 0)
    while True:
        number += 1
        if rank == 0:
            _say("begin", number)
        save(checkpoint(number), path)
        io.wait()
        if rank == 0:
            _say("done", number)


KILLS = Drill(_kills, _shares, piece=25, short=8, full=500)

if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
