"""One run of a project, in its own environment: ``python -P child.py SCRIPT RESULT [BLOCKED ...]``.

Writes what its ``main`` returned, as JSON. The BLOCKED packages cannot be imported, as if they were not installed.
Standard library only.
"""

from __future__ import annotations

import importlib.abc
import json
import runpy
import sys
import time
from pathlib import Path


class Blocked(importlib.abc.MetaPathFinder):
    """Hides packages, so that whoever still imports one of them is found out."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Raise for what is hidden; leave the rest to the other finders."""
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r} (it is hidden in this run)", name=fullname)


def main(script: str, result: str, *blocked: str) -> None:
    """Run the script's ``main`` and write what it returned and how many seconds it took."""
    sys.meta_path.insert(0, Blocked(list(blocked)))
    started = time.perf_counter()
    returned = runpy.run_path(script, run_name="project")["main"]()
    seconds = time.perf_counter() - started
    Path(result).write_text(json.dumps({"returned": returned, "seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
