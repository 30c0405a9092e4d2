"""The table that ``validate`` and ``test`` print."""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["print_results"]

_LOADER = re.compile(r"/dataloader_idx_\d+$")


def print_results(results: Sequence[dict[str, float]], stage: str, *, file: TextIO | None = None) -> None:
    """Print metrics by row and dataloaders by column; with rich if it is installed and ``file`` is a terminal.

    Args:
        results: from ``Reporter.results``.
        stage: for the heading, ``"test"`` or ``"validate"``.
        file: None: standard output.
    """
    out: TextIO = sys.stdout if file is None else file
    columns = [{_LOADER.sub("", name): value for name, value in result.items()} for result in results]
    names = sorted({name for column in columns for name in column})
    if not names:
        return
    table = [
        [f"{stage.capitalize()} metric", *(f"DataLoader {index}" for index in range(len(columns)))],
        *([name, *(repr(column[name]) if name in column else "" for column in columns)] for name in names),
    ]
    if not (out.isatty() and _print_rich(table, out)):
        _print_plain(table, out)


def _print_rich(table: list[list[str]], file: TextIO) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # optional: the plain table says the same
        return False
    drawn = Table(*table[0], header_style="bold magenta")
    for row in table[1:]:
        drawn.add_row(*row)
    Console(file=file).print(drawn)
    return True


def _print_plain(table: list[list[str]], file: TextIO) -> None:
    """As many columns side by side as the terminal is wide, the rest below, the names repeated."""
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    room = max(shutil.get_terminal_size().columns, 40)
    start = 1
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and widths[0] + sum(width + 2 for width in widths[start : stop + 1]) <= room:
            stop += 1
        shown = [0, *range(start, stop)]
        lines = ["  ".join(row[index].ljust(widths[index]) for index in shown).rstrip() for row in table]
        rule = "-" * max(map(len, lines))
        print(rule, lines[0], rule, *lines[1:], rule, sep="\n", file=file)
        start = stop
