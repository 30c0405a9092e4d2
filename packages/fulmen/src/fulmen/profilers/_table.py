"""A table of text, as reports have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, rule_after_first: bool = False) -> str:
    """Columns as wide as they must be, with lines around; ``rule_after_first`` draws one more below the first row."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "|  " + "  |  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + "  |" for row in (header, *rows)
    ]
    rule = "-" * len(lines[0])
    after = 2 if rule_after_first else 1
    middle = [rule] if rule_after_first else []
    return "\n".join([rule, lines[0], rule, *lines[1:after], *middle, *lines[after:], rule])
