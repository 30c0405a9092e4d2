"""Command: one subcommand of the ``fulmen`` script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Command"]


class Command(Protocol):
    """A function registered in ``fulmen.commands.v1``. The first line of its docstring is its help.

    Its module is imported whenever ``fulmen --help`` is asked for: import what is heavy inside the function.
    """

    def __call__(self, argv: Sequence[str], /) -> int:
        """Run with the arguments after the command's name and return the exit status."""
        ...
