"""``fulmen plugins``: which backends are installed, where each comes from, and whether it can be used here."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fulmen_protocols.discovery import check, load_factory, origin, other_versions, registrations
from fulmen_protocols.errors import BrokenPlugin, FulmenError
from fulmen_protocols.seams import ACCELERATORS, SEAMS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint

    from fulmen_protocols.seams import Seam

__all__ = ["PluginRow", "command", "list_plugins"]


@dataclass(frozen=True, slots=True)
class PluginRow:
    """One registered backend."""

    seam: str
    """What it is: "strategy", "accelerator", ..."""
    group: str
    """The entry-point group in which it is registered."""
    name: str
    """The name by which it is asked for."""
    distribution: str
    """The installed distribution that registers it."""
    version: str
    """That distribution's version."""
    object_path: str
    """Where its class or function is: "module:attribute"."""
    usable: bool
    """Whether asking for ``name`` would give this backend, as far as can be told without building it."""
    reason: str
    """Why it is not usable; empty when it is."""


def command(argv: Sequence[str]) -> int:
    """List every installed backend, and why one cannot be used here."""
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="fulmen plugins", description=command.__doc__)
    parser.add_argument("--json", action="store_true", help="print a list of objects, one for each backend")
    asked = parser.parse_args(argv)
    rows = list_plugins()
    print(json.dumps([asdict(row) for row in rows], indent=2) if asked.json else _as_text(rows))
    return 0


def list_plugins(seams: Sequence[Seam[object]] = SEAMS) -> list[PluginRow]:
    """Every backend registered for ``seams``: seams in the given order, names sorted.

    Each is imported; one that cannot be is a row with its error. Accelerators are built and asked whether a device is
    there. What imports print goes to standard error.
    """
    rows: list[PluginRow] = []
    for seam in seams:
        for _, points in sorted(registrations(seam.group).items()):
            winner = points[0]
            rows.append(_row(seam, winner, _why_not(seam, winner.name)))
            taken = f"{winner.name!r} is taken by {origin(winner)}, which comes first on sys.path"
            rows += [_row(seam, point, taken) for point in points[1:]]
        for point in sorted(other_versions(seam.group), key=lambda point: (point.group, point.name)):
            rows.append(_row(seam, point, f"it is made for {point.group}; this fulmen-protocols reads {seam.group}"))
    return rows


def _why_not(seam: Seam[object], name: str) -> str:
    try:
        # What a third party prints while it is imported would break --json.
        with contextlib.redirect_stdout(sys.stderr):
            factory = load_factory(seam, name)
            if not callable(factory):
                return f"it is {factory!r}, which cannot be called"
            if seam.group == ACCELERATORS.group and not check(ACCELERATORS, factory()).is_available():
                return "no such device on this machine"
    except BrokenPlugin as error:
        # The row already says whose it is and where it should be.
        return f"it cannot be imported: {type(error.__cause__).__name__}: {error.__cause__}"
    except FulmenError as error:
        return str(error)
    # Third-party code may raise anything; one broken plugin must not hide the others.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def _row(seam: Seam[object], point: EntryPoint, reason: str) -> PluginRow:
    dist = point.dist
    return PluginRow(
        seam=seam.noun,
        group=point.group,
        name=point.name,
        distribution=dist.name if dist is not None else "?",
        version=dist.version if dist is not None else "?",
        object_path=point.value,
        usable=not reason,
        reason=reason,
    )


def _as_text(rows: Sequence[PluginRow]) -> str:
    if not rows:
        return "No backend is installed. fulmen's own come with: pip install fulmen"
    cells = [(row.name, f"{row.distribution} {row.version}", row.object_path) for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    lines: list[str] = []
    group = ""
    for row, cell in zip(rows, cells, strict=True):
        if row.seam != group:
            group = row.seam
            lines += [*([""] if lines else []), group]
        columns = "  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True))
        lines.append(f"  {columns}  {'usable' if row.usable else 'not usable: ' + ' '.join(row.reason.split())}")
    return "\n".join(lines)
