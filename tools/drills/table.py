"""Rows of results: the table that drills print, and the file that lets them be run in pieces."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Row:
    """The outcome of one drill in one setting."""

    drill: str
    setting: str
    tried: int
    wrong: int
    """How often what must not happen did; the drill has failed unless it is 0."""
    notes: dict[str, int] = field(default_factory=dict)
    """What happened instead, and how often."""


def added(rows: list[Row]) -> list[Row]:
    """One row for each drill and setting, in the order in which they first came."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        sums = found.setdefault((row.drill, row.setting), Row(row.drill, row.setting, 0, 0))
        sums.tried += row.tried
        sums.wrong += row.wrong
        for note, count in row.notes.items():
            sums.notes[note] = sums.notes.get(note, 0) + count
    return list(found.values())


def read(file: Path) -> list[Row]:
    """The rows of a results file; none if there is no file. A last line that a kill cut off does not count."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def append(file: Path, row: Row) -> None:
    """Write a row behind the others, after what a kill may have left of a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("r+b" if file.exists() else "w+b") as stream:
        stream.seek(stream.read().rfind(b"\n") + 1)
        stream.truncate()
        stream.write(json.dumps(asdict(row)).encode() + b"\n")


def table(rows: list[Row]) -> str:
    """One line a row, as Markdown."""
    lines = ["| drill | setting | tried | went wrong | what happened |", "|---|---|---|---|---|"]
    for row in rows:
        notes = ", ".join(f"{count} {note}" for note, count in row.notes.items() if count)
        lines.append(f"| {row.drill} | {row.setting} | {row.tried} | {row.wrong} | {notes} |")
    return "\n".join(lines)
