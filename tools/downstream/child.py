"""One run of a project, in its own environment: ``python -P child.py SCRIPT RESULT [--hide-lightning [NAME ...]]``.

Writes what its ``main`` returned, as JSON. With ``--hide-lightning``, Lightning cannot be imported, as if it were not
installed, but by the packages that are named. Standard library only.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
import time
from pathlib import Path

LIGHTNING = ["lightning", "pytorch_lightning", "lightning_fabric"]


def importer() -> str:
    """The package of the code that is importing."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name not in ("importlib", __name__):
            return name
        frame = frame.f_back
    return ""


class Hidden(importlib.abc.MetaPathFinder):
    """Hides Lightning from all but some packages, so that whoever else still imports it is found out."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = [*allowed, *LIGHTNING]

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Raise for what is hidden; leave the rest to the other finders."""
        if fullname.partition(".")[0] in LIGHTNING and importer() not in self.allowed:
            raise ModuleNotFoundError(f"No module named {fullname!r} (it is hidden in this run)", name=fullname)


def main(script: str, result: str, *options: str) -> None:
    """Run the script's ``main`` and write what it returned and how many seconds it took."""
    if options:
        sys.meta_path.insert(0, Hidden(list(options[1:])))
    started = time.perf_counter()
    spec = importlib.util.spec_from_file_location("project_script", script)
    assert spec is not None
    assert spec.loader is not None
    project = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = project  # so that what it defines can be pickled
    spec.loader.exec_module(project)
    returned = project.main()
    seconds = time.perf_counter() - started
    Path(result).write_text(json.dumps({"returned": returned, "seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
