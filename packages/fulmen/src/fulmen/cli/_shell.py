"""LightningCLI for the ``fulmen`` command: one subcommand, any module, any data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.cli.lightning_cli import LightningCLI

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen.cli.parser import ArgsType, LightningArgumentParser

__all__ = ["Shell", "build"]


class Shell(LightningCLI):
    """Builds everything for one subcommand; ``start`` runs it, so that the two fail apart."""

    only: str

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that was asked for: making a parser costs time."""
        return {cls.only: LightningCLI.subcommands()[cls.only]}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Set ``self.config``; ``args`` are the process's own arguments."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def start(self) -> None:
        """Run the subcommand."""
        super()._run_subcommand(self.only)

    def _run_subcommand(self, subcommand: str) -> None:
        """Everything is built; ``start`` goes on."""


def build(subcommand: str, arguments: Sequence[str]) -> Shell:
    """Everything that the arguments ask for, ready to run."""

    class Chosen(Shell):
        only = subcommand

    Chosen.__name__ = "fulmen"
    return Chosen(args=[subcommand, *arguments], parser_kwargs={"prog": "fulmen"})
