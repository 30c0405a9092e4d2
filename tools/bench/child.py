"""Running one measurement in a fresh process, pinned to one core and with one thread, where the machine can do that."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.workspace import ROOT


class MeasurementFailed(RuntimeError):
    """The child process ended with an error; its last lines are the message."""


def environment(**more: str) -> dict[str, str]:
    """The child's environment: one thread, no accelerator, the repository importable, its bytecode kept as pip does."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **fixed, **more}


def spawn(module: str, *arguments: object, python: str = sys.executable, timeout_s: float = 3600) -> Any:
    """Run ``python -m module --child ...``, which writes its result with ``finish``, and return that result.

    Raises:
        MeasurementFailed: the child failed.
    """
    pin = ["taskset", "-c", "0"] if shutil.which("taskset") else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [*pin, python, "-m", module, "--child", str(result), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode or not result.exists():
            raise MeasurementFailed("\n".join((done.stderr or done.stdout).strip().splitlines()[-12:]))
        return json.loads(result.read_text(encoding="utf-8"))


def finish(path: str, result: object) -> None:
    """Hand the child's result to the parent."""
    Path(path).write_text(json.dumps(result), encoding="utf-8")


def contestant_parser(description: str | None, default: list[str]) -> argparse.ArgumentParser:
    """The arguments that the measurements share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "contestants", nargs="*", default=default, help=f"default: {' '.join(default)}, where installed"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH", help="measure NAME with another Python"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def pythons(arguments: argparse.Namespace) -> dict[str, str]:
    """Which Python measures which contestant, where it is not this one."""
    return dict(pair.split("=", 1) for pair in arguments.python)


def installed(name: str, python: str) -> bool:
    """Whether ``python`` can import what the contestant ``name`` needs."""
    code = f"import sys; from tools.bench.contestants import importable; sys.exit(not importable({name!r}))"
    return (
        subprocess.run([python, "-c", code], env=environment(), cwd=tempfile.gettempdir(), check=False).returncode == 0
    )


def print_table(head: list[str], rows: list[list[str]], *, markdown: bool) -> None:
    """Print rows under a head, aligned, or as Markdown."""
    if markdown:
        for row in [head, ["---"] * len(head), *rows]:
            print(f"| {' | '.join(row)} |")
        return
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print(
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
