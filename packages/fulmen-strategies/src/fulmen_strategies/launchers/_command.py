"""The command that runs this program once more."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["program_again", "script_index"]

_FLAGS_WITH_VALUE = ("W", "X")

# Go back to where the program was started, then become it, with a name of one's own for Hydra's log file.
_AS_HYDRA_JOB = (
    "import os, sys; os.chdir(sys.argv[1]); name = f'hydra.job.name={sys.argv[2]}_rank' + os.environ['LOCAL_RANK']; "
    "os.execv(sys.executable, [sys.executable, *sys.argv[3:], name])"
)


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
    return [sys.executable, *(_as_hydra_job(arguments) or arguments)]


def _as_hydra_job(arguments: Sequence[str]) -> list[str] | None:
    """In a program that Hydra has started: the arguments for one more process of the same job; None elsewhere.

    It works in rank 0's run folder and writes no configuration of its own there.
    """
    if "hydra" not in sys.modules:
        return None
    config: Any = import_module("hydra.core.hydra_config").HydraConfig
    if not config.initialized():
        return None
    job = config.get()
    folder = str(job.runtime.output_dir).replace('"', '\\"')
    same_job = [f'hydra.run.dir="{folder}"', "hydra.output_subdir=null"]
    return ["-c", _AS_HYDRA_JOB, str(job.runtime.cwd), str(job.job.name), *arguments, *same_job]


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
