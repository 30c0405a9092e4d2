"""Where a process of a run is: a note that it overwrites in shared memory, for others to read when it has failed.

Whoever starts several processes opens a note in each of them (``Whereabouts.open``); a loop that finds one
(``current_whereabouts``) writes down where it is. Writing costs less than a microsecond and tells nobody: no
collective, no system call. What a process wrote last outlives it, however it ended.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["PHASES", "Position", "Whereabouts", "current_whereabouts", "read_positions"]

PHASES = ("outside of a run", "training", "validation", "test", "prediction", "the sanity check")
"""What a loop may be in, by number."""

_PLACE = struct.Struct("<4q")  # phase, epoch, batch, optimizer steps
_PULSE = struct.Struct("<2qd")  # process id, collectives begun, time of the last sign of life
_SIZE = _PLACE.size + _PULSE.size


class Position(NamedTuple):
    """What a note says.

    Attributes:
        phase: index into ``PHASES``.
        epoch: of training, from 0.
        batch: index of the batch that was begun last.
        step: optimizer steps taken.
        pid: the process.
        collectives: collectives that it had begun, over all groups, and meetings of other kinds.
        seen_s: when it last showed that it lives, in seconds since the epoch.
    """

    phase: int
    epoch: int
    batch: int
    step: int
    pid: int
    collectives: int
    seen_s: float

    def __str__(self) -> str:
        if self.phase == 0:
            return PHASES[0] if self.step == 0 else f"{PHASES[0]}, after optimizer step {self.step}"
        return f"step {self.step}, in {PHASES[self.phase]}, epoch {self.epoch}, batch {self.batch}"


class Whereabouts:
    """The note of this process.

    Args:
        file: made anew.
    """

    def __init__(self, file: str) -> None:
        Path(file).write_bytes(bytes(_SIZE))
        with open(file, "r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), _SIZE)
        self.pid = os.getpid()
        self.error: BaseException | None = None
        """What ended the last run in this process, if that was an error."""
        self.meetings = 0
        """How often this process has waited for all others without a collective. To be raised before it waits."""
        self.pulse(0)

    @staticmethod
    def open(folder: str, rank: int) -> Whereabouts:
        """Begin the note of ``rank`` in ``folder``, and let ``current_whereabouts`` find it in this process."""
        global _current
        _current = Whereabouts(os.path.join(folder, f"{_PREFIX}{rank}"))
        return _current

    def at(self, phase: int, epoch: int, batch: int, step: int) -> None:
        """Write down where the loop is; see ``Position``."""
        _PLACE.pack_into(self._memory, 0, phase, epoch, batch, step)

    def leave(self) -> None:
        """The run is over; how many steps it has taken stays."""
        _PLACE.pack_into(self._memory, 0, 0, *_PLACE.unpack_from(self._memory, 0)[1:])

    def pulse(self, collectives: int) -> None:
        """Show that this process lives, and has begun so many collectives. For a thread beside the loop."""
        known = _PULSE.unpack_from(self._memory, _PLACE.size)[1]  # a group that was left takes its count with it
        begun = max(known, collectives + self.meetings)
        _PULSE.pack_into(self._memory, _PLACE.size, self.pid, begun, time.time())

    def read(self) -> Position:
        """What is written now."""
        return _position(self._memory[:])


_PREFIX = "at."
_current: Whereabouts | None = None


def current_whereabouts() -> Whereabouts | None:
    """This process's note; None where nobody wants to know."""
    return _current if _current is not None and _current.pid == os.getpid() else None  # a fork has none


def read_positions(folder: str) -> dict[int, Position]:
    """The notes in ``folder``, by rank."""
    found: dict[int, Position] = {}
    for file in Path(folder).glob(f"{_PREFIX}*"):
        rank = file.name.removeprefix(_PREFIX)
        content = file.read_bytes()
        if rank.isdigit() and len(content) == _SIZE:
            found[int(rank)] = _position(content)
    return dict(sorted(found.items()))


def _position(content: bytes) -> Position:
    return Position(*_PLACE.unpack_from(content, 0), *_PULSE.unpack_from(content, _PLACE.size))
