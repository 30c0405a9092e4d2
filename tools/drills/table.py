"""The table that drills print."""

from __future__ import annotations

from dataclasses import dataclass, field


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


def table(rows: list[Row]) -> str:
    """One line a row, as Markdown."""
    lines = ["| drill | setting | tried | went wrong | what happened |", "|---|---|---|---|---|"]
    for row in rows:
        notes = ", ".join(f"{count} {note}" for note, count in row.notes.items() if count)
        lines.append(f"| {row.drill} | {row.setting} | {row.tried} | {row.wrong} | {notes} |")
    return "\n".join(lines)
