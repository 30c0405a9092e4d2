"""The ``fulmen`` script: finds subcommands that distributions register, and hands over to one of them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

from fulmen_protocols.discovery import available, load_factory
from fulmen_protocols.errors import FulmenError
from fulmen_protocols.seams import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_protocols.command import Command

__all__ = ["main"]

_USAGE = "usage: fulmen COMMAND [ARGUMENT ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand with the arguments that follow its name; ``None``: those of this process.

    Returns:
        The exit status: the command's own; 2 when no command has that name, 1 when it cannot be imported.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130  # what a shell reports for SIGINT
    except BrokenPipeError:
        # The reader has gone (`fulmen plugins | head`). Python would complain again while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for SIGPIPE


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(_versions())
        return 0
    if name == "help" and "help" not in available(COMMANDS):
        return _dispatch([*rest[:1], "--help"])
    if name.startswith("-"):
        print(f"fulmen: no option is named {name!r}.\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        command = _command(name)
    except LookupError as error:
        print(f"fulmen: {error}", file=sys.stderr)
        return 2
    except FulmenError as error:
        print(f"fulmen: {error}", file=sys.stderr)
        return 1
    return command(rest)


def _command(name: str) -> Command:
    found = load_factory(COMMANDS, name)
    if not callable(found):
        raise FulmenError(f"command {name!r} is registered as {found!r}, which cannot be called.")
    return cast("Command", found)


def _help() -> str:
    names = available(COMMANDS)
    width = max((len(name) for name in names), default=0)
    rows = [f"  {name:<{width}}  {_first_line(name)}" for name in names]
    return "\n".join([_USAGE, "", "commands:", *rows, "", "fulmen COMMAND --help says more about one of them."])


def _first_line(name: str) -> str:
    try:
        text = (_command(name).__doc__ or "").strip()
    except FulmenError as error:
        return f"(broken) {error}"
    return text.splitlines()[0] if text else ""


def _versions() -> str:
    from importlib.metadata import distributions

    found = {d.name: d.version for d in distributions() if d.name == "fulmen" or d.name.startswith("fulmen-")}
    return "\n".join(f"{name} {found[name]}" for name in sorted(found))
