"""Run the Python blocks of a Markdown file as they stand: ``python -m tools.readme FILE ...``, or as a plain script.

All blocks fenced with ```python of one file run in order in one process, in an empty folder: a reader who copies them
one after the other gets the same. A block that shows a fragment is fenced ```py and does not run.
Standard library only: it also runs in environments that hold one package and its declared needs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FENCE = re.compile(r"^(?P<indent>[ ]*)```python[ \t]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """Line number of the first line of code, and the code without its indentation, of every ```python block."""
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        indent = len(match["indent"])
        found.append((line, "\n".join(row[indent:] for row in match["code"].split("\n"))))
    return found


def script(path: Path) -> str:
    """One program made of all blocks of ``path``, each on the line it has there, so that tracebacks point into it."""
    lines: list[str] = []
    for start, code in blocks(path.read_text(encoding="utf-8")):
        lines += [""] * (start - 1 - len(lines))
        lines += code.rstrip("\n").split("\n")
    return "\n".join(lines) + "\n"


def run(path: Path, python: str = sys.executable, *, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the blocks of ``path`` with ``python``, every warning shown, and return what happened."""
    with tempfile.TemporaryDirectory() as folder:
        # Processes that a block starts (DDP) run the main script again: it must be a file that stays while they live.
        program = Path(folder) / f"{path.stem.lower().replace('-', '_')}_blocks.py"
        program.write_text(script(path), encoding="utf-8")
        # The examples are small: several threads would only wait for each other, most of all on a busy machine.
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        return subprocess.run(
            [python, str(program)],
            cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip


def main(files: list[str]) -> int:
    """Run each file; print what failed; return 0 if nothing did. ``--at-least=1`` refuses a file without a block."""
    at_least = sum(int(name.partition("=")[2]) for name in files if name.startswith("--at-least="))
    files = [name for name in files if not name.startswith("--")]
    failed = 0
    for name in files:
        path = Path(name).resolve()
        count = len(blocks(path.read_text(encoding="utf-8")))
        result = run(path) if count else None
        ok = count >= at_least and (result is None or result.returncode == 0)
        print(f"{'ok    ' if ok else 'FAILED'} {name}: {count} block{'' if count == 1 else 's'}", flush=True)
        if not ok:
            needed = f"it needs at least {at_least} ```python block(s)"
            print(needed if result is None else result.stdout + result.stderr, flush=True)
            failed += 1
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
