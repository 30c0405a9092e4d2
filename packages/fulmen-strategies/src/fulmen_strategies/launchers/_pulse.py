"""The thread in each rank that shows a sign of life, counts collectives, and says where the rank stands when asked."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from fulmen_protocols import Whereabouts

__all__ = [
    "Collective",
    "Pulse",
    "Standing",
    "ask_all",
    "collectives_begun",
    "last_collectives",
    "read_standing",
    "stack_here",
]

_POLL_S = 0.2
_ASKED = "asked"
_KEPT = 20  # collectives of the flight recorder


class Collective(NamedTuple):
    """A collective as torch's flight recorder saw it.

    Attributes:
        group: the process group's name.
        number: which one of the group, from 1.
        what: backend, operation and shapes, for example ``gloo:all_reduce [[10]]``.
    """

    group: str
    number: int
    what: str


class Standing(NamedTuple):
    """What a rank that still lived said when it was asked: its stack, and its last collectives."""

    stack: list[str]
    collectives: list[Collective]


class Pulse:
    """Writes ``Whereabouts`` of this rank in ``folder`` a few times a second, and answers ``ask_all``."""

    def __init__(self, folder: str, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self.note = Whereabouts.open(folder, rank)
        self._has_answered = False

    def start(self) -> None:
        """Begin, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="fulmen-pulse", daemon=True).start()

    def beat(self) -> None:
        """One sign of life, and an answer if one is asked for."""
        self.note.pulse(collectives_begun())
        if not self._has_answered and os.path.exists(os.path.join(self._folder, _ASKED)):
            self._has_answered = True
            standing = {"stack": stack_here(), "collectives": last_collectives()}
            _write_whole(_answer(self._folder, self._rank), json.dumps(standing))

    def _run(self) -> None:
        while True:
            self.beat()
            time.sleep(_POLL_S)


def ask_all(folder: str, ranks: set[int], patience_s: float) -> None:
    """Have every rank with a pulse say where it stands; return when ``ranks`` have, or after so many seconds."""
    Path(folder, _ASKED).touch()
    until = time.monotonic() + patience_s
    while time.monotonic() < until and not all(os.path.exists(_answer(folder, rank)) for rank in ranks):
        time.sleep(0.02)


def read_standing(folder: str, rank: int) -> Standing | None:
    """What ``rank`` has said; None if nothing."""
    try:
        said = json.loads(Path(_answer(folder, rank)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Standing(said["stack"], [Collective(*entry) for entry in said["collectives"]])


def stack_here() -> list[str]:
    """Lines of the main thread's stack, the innermost call last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # pyright: ignore[reportPrivateUsage]
    return "".join(traceback.format_stack(frame)).splitlines()


def last_collectives() -> list[Collective]:
    """From torch's flight recorder, the oldest first; empty where this torch, or the backend, has none."""
    dump = getattr(c10d, "_dump_fr_trace_json", None) or getattr(c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return []
    try:
        entries = cast("list[dict[str, Any]]", json.loads(dump()).get("entries", []))
        return [
            Collective(
                str(entry["process_group"][0]),
                int(entry["collective_seq_id"]),
                _called(str(entry["profiling_name"]), entry["input_sizes"]),
            )
            for entry in entries[-_KEPT:]
            if not entry.get("is_p2p")  # one sends what another receives
        ]
    except (ValueError, KeyError, TypeError, RuntimeError):  # its layout is torch's own business
        return []


def _called(name: str, sizes: object) -> str:
    """Operation and shapes; without these where ranks may differ in them."""
    return name if any(word in name for word in ("scatter", "gather", "all_to_all")) else f"{name} {sizes}"


def collectives_begun() -> int:
    """How many this process has begun, over all its groups."""
    if not dist.is_initialized():
        return 0
    try:
        groups: list[Any] = list(distributed_c10d._world.pg_map)  # pyright: ignore[reportPrivateUsage]
        return sum(int(group._get_sequence_number_for_group()) for group in groups)
    except RuntimeError:  # a group that is being made or destroyed
        return 0


def _answer(folder: str, rank: int) -> str:
    return os.path.join(folder, f"standing.{rank}")


def _write_whole(file: str, text: str) -> None:
    draft = f"{file}.draft"
    Path(draft).write_text(text, encoding="utf-8")
    os.replace(draft, file)
