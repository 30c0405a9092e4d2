"""LightningCLI for the ``fulmen`` command: one subcommand, any module, any data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.cli.lightning_cli import LightningCLI

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fulmen.cli.parser import ArgsType, LightningArgumentParser

__all__ = ["build"]


def build(subcommand: str, arguments: Sequence[str]) -> Callable[[], None]:
    """Build everything that the arguments ask for; return what runs it, so that the two fail apart."""

    class Shell(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """The one that was asked for: making a parser costs time."""
            return {subcommand: LightningCLI.subcommands()[subcommand]}

        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            """Set ``self.config``; ``args`` are the process's own arguments."""
            assert isinstance(args, list)
            self.config = parser.parse_args(args)

        def start(self) -> None:
            """Run the subcommand."""
            super()._run_subcommand(subcommand)

        def _run_subcommand(self, subcommand: str) -> None:
            """Everything is built; ``start`` goes on."""

    Shell.__name__ = "fulmen"
    return Shell(args=[subcommand, *arguments], parser_kwargs={"prog": "fulmen"}).start
