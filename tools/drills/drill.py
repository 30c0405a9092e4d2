"""What a drill is: attempts in several settings, any of which can be run in pieces."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import zip_longest

from tools.drills.table import Row

Attempts = Callable[[str, int, int], Row]
"""``attempts(setting, first, count)`` makes attempts number ``first`` to ``first + count - 1`` in a setting."""


@dataclass(frozen=True)
class Drill:
    """One kind of fault, in the settings in which it is provoked."""

    open: Callable[[], AbstractContextManager[Attempts]]
    """What attempts need, a server or files, until the block ends."""
    shares: Callable[[int], dict[str, int]]
    """How many of ``count`` attempts each setting gets."""
    piece: int
    """So many attempts are made before their outcome is written down."""
    short: int
    """The count for CI."""
    full: int
    """The count of docs/reliability.md."""
    parallel: bool = False
    """Whether attempts are processes of their own, several of which can run at a time."""

    def run(self, count: int, done: dict[str, int], jobs: int, tell: Callable[[Row], None]) -> None:
        """Make ``count`` attempts, less those ``done`` in each setting; the settings take turns, a piece at a time."""
        rounds = [
            [
                (setting, first, min(self.piece, share - first))
                for first in range(done.get(setting, 0), share, self.piece)
            ]
            for setting, share in self.shares(count).items()
        ]
        pieces = [piece for pieces in zip_longest(*rounds) for piece in pieces if piece is not None]
        if not pieces:
            return
        with self.open() as attempts, ThreadPoolExecutor(jobs if self.parallel else 1) as pool:
            for row in pool.map(lambda piece: attempts(*piece), pieces):
                tell(row)


def evenly(settings: list[str], count: int) -> dict[str, int]:
    """``count`` shared out among settings; the first ones get what is left over."""
    return {name: count // len(settings) + (index < count % len(settings)) for index, name in enumerate(settings)}
