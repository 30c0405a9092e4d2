"""Mutated and flipped checkpoint files.

Each file is loaded in a child process that watches the interpreter's audit events: a mutation may be refused, or load
exactly what was saved; it must not run code, end the process, or load anything else.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fulmen_checkpoint import TorchCheckpointIO
from fulmen_protocols import CheckpointError
from tools.drills.checkpoints import FORMATS, checkpoint, copied, files_of, same
from tools.drills.drill import Attempts, Drill, evenly
from tools.drills.table import Row

WATCHED = ("pickle.find_class", "exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "os.fork",
           "os.remove", "os.rename", "subprocess.Popen", "socket.connect", "ctypes.dlopen")  # fmt: skip


@contextmanager
def _flips() -> Iterator[Attempts]:
    """Change one byte, at a random place of a random file of the checkpoint, and verify."""
    with tempfile.TemporaryDirectory() as temporary:

        def attempts(setting: str, first: int, count: int) -> Row:
            whole = Path(temporary, setting.replace(" ", "-"))
            if not whole.exists():
                FORMATS[setting]().save_checkpoint(checkpoint(), whole)
            files = [(file, file.read_bytes()) for file in files_of(whole)]
            missed = 0
            for index in range(first, first + count):
                rng = random.Random(f"{setting} {index}")
                file, data = rng.choices(files, weights=[len(data) for _, data in files])[0]
                place = rng.randrange(len(data))
                file.write_bytes(data[:place] + bytes([data[place] ^ rng.randrange(1, 256)]) + data[place + 1 :])
                try:
                    TorchCheckpointIO().verify_checkpoint(whole)
                    missed += 1
                except CheckpointError:
                    pass
                file.write_bytes(data)
            TorchCheckpointIO().verify_checkpoint(whole)
            return Row("flips", setting, count, missed, {"found": count - missed})

        yield attempts


@contextmanager
def _mutated() -> Iterator[Attempts]:
    """Mutations of files of every format, of ours and of others."""
    with tempfile.TemporaryDirectory() as temporary:
        sources = _sources(Path(temporary))
        yield lambda setting, first, count: _mutate_in_children(setting, sources[setting], first, count)


# Files that we read but did not write carry no digest, or one of their records only.
FOREIGN = ["file without a digest", "file of torch's old format", "folder of torch.distributed.checkpoint"]


def _sources(folder: Path) -> dict[str, Path]:
    made = {}
    for name, make in FORMATS.items():
        made[name] = folder / name.replace(" ", "-")
        make().save_checkpoint(checkpoint(), made[name])
    plain, legacy, distributed = (made.setdefault(name, folder / f"foreign-{i}") for i, name in enumerate(FOREIGN))
    torch.save(checkpoint(), plain)
    torch.save(checkpoint(), legacy, _use_new_zipfile_serialization=False)
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save({"model": checkpoint()["state_dict"]}, checkpoint_id=distributed)
    return made


def _mutate_in_children(name: str, source: Path, first: int, count: int) -> Row:
    """Children load one mutation after another; one that dies has met a wrong one, and another goes on behind it."""
    done, end = first, first + count
    notes = {"refused": 0, "loaded as saved": 0, "loaded otherwise, with a warning that nothing is checked": 0}
    crashed = other = events = 0
    while done < end:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tools.drills.checkpoint_mutations", str(source), str(done),
             str(end), name],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            notes["refused"] += line["outcome"] == "refused"
            notes["loaded as saved"] += line["outcome"] == "same"
            notes["loaded otherwise, with a warning that nothing is checked"] += line["outcome"] == "warned"
            other += line["outcome"] not in ("refused", "same", "warned")
            events += bool(line["events"])
            if line["outcome"] not in ("refused", "same", "warned") or line["events"]:
                print(f"{name}: {line}", file=sys.stderr)
        done += len(lines)
        if done < end:
            print(
                f"{name}: mutation {done} ended the interpreter ({child.returncode}): {child.stderr[-500:]}",
                file=sys.stderr,
            )
            crashed += 1
            done += 1
    notes |= {"ended the interpreter": crashed, "ran code": events, "loaded otherwise": other}
    return Row("mutated", name, count, crashed + events + other, notes)


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which files go wrong, or are made to."""
    way = rng.randrange(8)
    place = rng.randrange(len(data)) if data else 0
    if way == 0:
        return data[:place]
    if way == 1:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if way == 2:  # a burst
        return data[:place] + rng.randbytes(rng.randrange(1, 64)) + data[place + 8 :]
    if way == 3:  # a hole of zeros, as after a power failure
        length = rng.randrange(1, 4096)
        return data[:place] + bytes(min(length, len(data) - place)) + data[place + length :]
    if way == 4:  # a piece twice, or moved
        other = rng.randrange(len(data)) if data else 0
        return data[:place] + data[other : other + rng.randrange(1, 512)] + data[place:]
    if way == 5:
        return data + rng.randbytes(rng.randrange(1, 200))
    if way == 6:  # an attack, alone or in the middle
        attack = pickle.dumps(_Evil(), protocol=rng.choice((0, 2, 4)))
        return attack if rng.random() < 0.3 else data[:place] + attack + data[place + len(attack) :]
    return bytes(byte ^ (1 << rng.randrange(8)) if rng.random() < 0.002 else byte for byte in data)


def _shows_a_traceback() -> bool:
    """Whether Python parses a line of a source file, to underline a part of it in a traceback: it runs nothing."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals.get("__name__") == "ast":
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "traceback"


def _child(source: Path, first: int, end: int, seed: str) -> None:
    """Load the mutations from ``first`` on, up to ``end``, and print what each did."""
    expected = TorchCheckpointIO().load_checkpoint(source)
    seen: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in WATCHED and not (event == "compile" and _shows_a_traceback()):
            seen.append(f"{event} {str(arguments)[:80]}")

    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        target = Path(temporary, "checkpoint")
        _warm_up(source, target)
        sys.addaudithook(hook)
        for index in range(first, end):
            rng = random.Random(f"{seed} {index}")
            copy = copied(source, target)
            file = rng.choice(files_of(copy))
            file.write_bytes(mutate(file.read_bytes(), rng))
            seen.clear()
            watching = True
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    loaded = TorchCheckpointIO().load_checkpoint(copy)
                warned = any("carries no checksum" in str(warning.message) for warning in caught)
                outcome = "same" if same(loaded, expected) else "warned" if warned else "loaded otherwise"
            except CheckpointError:
                outcome = "refused"
            except BaseException as error:  # noqa: BLE001 - what it is, is what the drill tells
                outcome = f"{type(error).__name__}: {error}"
            watching = False
            if Path("pwned").exists():
                seen.append("code was run")
            print(json.dumps({"index": index, "outcome": outcome, "events": seen, "file": file.name}), flush=True)


def _warm_up(source: Path, target: Path) -> None:
    """Load good and bad files once: what imports modules at its first use has done so."""
    import encodings.cp437  # noqa: F401 - zipfile takes it for names without the mark of UTF-8

    for seed in range(60):
        copy = copied(source, target)
        file = files_of(copy)[seed % len(files_of(copy))]
        file.write_bytes(mutate(file.read_bytes(), random.Random(seed)))
        with suppress(CheckpointError):
            TorchCheckpointIO().load_checkpoint(copy)


FLIPS = Drill(_flips, lambda count: dict.fromkeys(FORMATS, count), piece=250, short=100, full=1_000)
MUTATED = Drill(_mutated, lambda count: evenly([*FORMATS, *FOREIGN], count), piece=500, short=120, full=10_000)

if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
