"""Reading a run's log: what is whole in it, and of a run that was resumed each point once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

from fulmen.runlog._items import Hyperparameters, Row
from fulmen.runlog._record import FILE, FORMAT, Record, decode, number
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Located", "RunLog", "deliverable", "find", "read_run", "records"]


class Located(NamedTuple):
    """A record, and where its line begins and ends in the file, in bytes."""

    record: Record
    start: int
    end: int


def find(run: str) -> str:
    """The log of ``run``, a run's folder or the file itself.

    Raises:
        MisconfigurationException: there is none.
    """
    path = os.path.expanduser(run)
    if os.path.isdir(path):
        path = os.path.join(path, FILE)
    if not os.path.isfile(path):
        raise MisconfigurationException(
            f"{run!r} holds no log of a run: there is no file {path!r}. Give the folder that a Trainer with a logger "
            f"has written to (it has a {FILE}), or that file."
        )
    return path


def records(path: str, start: int = 0, end: int | None = None) -> Iterator[Located]:
    """The records of a file between two positions, in order. Lines that are not whole are left out."""
    with open(path, "rb") as stream:
        stream.seek(start)
        position = start
        for line in stream:
            begin, position = position, position + len(line)
            if end is not None and begin >= end:
                return
            if line.endswith(b"\n") and (record := decode(line)) is not None:
                yield Located(record, begin, position)


def deliverable(located: Located) -> Row | Hyperparameters | None:
    """What a logger is told of a record; None: nothing."""
    record, start, end = located
    if record["kind"] == "metrics":
        given = cast("Mapping[str, object]", record.get("values", {}))
        values = {name: value for name, text in given.items() if (value := number(text)) is not None}
        return Row(values, int(cast("int", record["x"])), float(cast("float", record["t"])), start, end)
    if record["kind"] == "hparams":
        return Hyperparameters(cast("Mapping[str, object]", record["values"]), start, end)
    return None


@dataclass
class RunLog:
    """What a run's log says."""

    path: str
    rows: list[Located] = field(default_factory=list[Located])
    """Records of kind ``metrics``; of points that were logged again after a resume the later ones only."""
    hparams: dict[str, object] = field(default_factory=dict[str, object])
    begins: list[Record] = field(default_factory=list[Record])
    ends: list[Record] = field(default_factory=list[Record])
    states: list[Record] = field(default_factory=list[Record])
    checkpoints: list[Record] = field(default_factory=list[Record])
    stages: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by stage, over all calls."""

    @property
    def status(self) -> str:
        """``success``, ``failed``, ``finished``, or ``unfinished`` if the last call never said."""
        if not self.ends or len(self.ends) < len(self.begins):
            return "unfinished"
        return str(self.ends[-1].get("status"))


def read_run(run: str) -> RunLog:
    """Read the log of a run.

    A fit says at which step it begins. Points that were logged beyond that step before are left out, since they are
    logged again; where it is the same step, the later one counts.

    Raises:
        MisconfigurationException: there is no log, or a newer version of fulmen wrote it.
    """
    found = RunLog(find(run))
    kept: list[_Kept] = []
    stages: dict[int, Mapping[str, float]] = {}
    attempt = -1
    for located in records(found.path):
        record = located.record
        match record["kind"]:
            case "begin":
                version = record.get("format")
                if not isinstance(version, int) or version > FORMAT:
                    raise MisconfigurationException(
                        f"{found.path!r} is of format {version!r}, and this version of fulmen reads {FORMAT}. "
                        "Update it: pip install -U fulmen"
                    )
                attempt += 1
                found.begins.append(record)
            case "position":
                kept = [one for one in kept if _at(one.located.record) <= _at(record)]
                found.states = [state for state in found.states if _at(state) <= _at(record)]
            case "metrics":
                kept.append(_Kept(attempt, str(found.begins[-1].get("fn")) if found.begins else "", located))
            case "hparams":
                found.hparams.update(cast("Mapping[str, object]", record["values"]))
            case "state":
                found.states.append(record)
            case "checkpoint":
                found.checkpoints.append(record)
            case "stages":
                stages[attempt] = cast("Mapping[str, float]", record["seconds"])
            case "end":
                found.ends.append(record)
            case _:
                pass  # of a later version that reads like this one
    found.rows = _once(kept)
    for seconds in stages.values():
        for name, value in seconds.items():
            found.stages[name] = found.stages.get(name, 0.0) + value
    return found


def _at(record: Record) -> int:
    return int(cast("int", record.get("at", 0)))


class _Kept(NamedTuple):
    attempt: int
    fn: str
    located: Located

    @property
    def key(self) -> tuple[object, ...]:
        record = self.located.record
        return (self.fn, record["x"], record.get("of"), *cast("Mapping[str, object]", record["values"]))


def _once(kept: list[_Kept]) -> list[Located]:
    """Of rows with the same names at the same x, from different processes, the last."""
    latest = {one.key: one.attempt for one in kept}
    return [one.located for one in kept if latest[one.key] == one.attempt]
