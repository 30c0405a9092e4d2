"""The command that runs this program once more."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["program_again", "script_index"]

_FLAGS_WITH_VALUE = ("W", "X")


def program_again() -> list[str]:
    """The interpreter, its flags, the script or module, and the arguments, as the operating system was given them.

    Raises:
        MisconfigurationException: there is no program to run again: a Python prompt, or a script from standard input.
    """
    arguments = list(sys.orig_argv[1:])
    index = script_index(arguments)
    if index is None:
        raise MisconfigurationException(
            f"the launcher starts ranks by running the program again, but {sys.orig_argv!r} names no script or module: "
            "put the code into a file, or use one device."
        )
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if index < len(arguments) and main_file and os.path.basename(main_file) == os.path.basename(arguments[index]):
        arguments[index] = main_file  # absolute: the program may have changed its working directory since
    return [sys.executable, *arguments]


def script_index(arguments: Sequence[str]) -> int | None:
    """Index of the script in the interpreter's ``arguments``; their number for ``-m``, ``-c``; None for no program."""
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "-":
            return None
        if not argument.startswith("-"):
            return index
        if argument == "--check-hash-based-pycs":
            index += 1
        elif not argument.startswith("--"):
            # Short flags may be joined: -Bm module, -Wdefault. The first that takes a value takes the rest.
            for place, letter in enumerate(argument[1:], start=1):
                if letter in "cm":
                    return len(arguments)
                if letter in _FLAGS_WITH_VALUE:
                    index += place == len(argument) - 1
                    break
        index += 1
    return None
