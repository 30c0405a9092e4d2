"""One run of a project, in its own environment: ``python -P child.py SCRIPT RESULT [--hide-lightning [NAME ...]]``.

Writes what its ``main`` returned, as JSON. With ``--hide-lightning``, Lightning cannot be imported, as if it were not
installed, but by the packages that are named. Of the project it imports the script alone.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    """Hides Lightning from all but some packages, so that whoever else still imports it is found out.

    As a finder from whoever is first; as ``__import__`` also where one of the allowed has imported it.
    """

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = [*allowed, *LIGHTNING]
        self.importing = builtins.__import__

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Raise for what is hidden; leave the rest to the other finders."""
        self.check(fullname, importer())

    def check(self, name: str, by: str) -> None:
        """Raise as if it were not installed."""
        if name.partition(".")[0] in LIGHTNING and by not in self.allowed:
            raise ModuleNotFoundError(f"No module named {name!r} (it is hidden in this run)", name=name)

    def __call__(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """What an import statement calls."""
        if level == 0:
            self.check(name, str((globals or {}).get("__name__", "")).partition(".")[0])
        return self.importing(name, globals, locals, fromlist, level)


def let_torchvision_import() -> None:
    """Declare the two operators without which it cannot be imported, if it is there without its compiled part.

    Its wheel on PyPI is built for CUDA. Beside a torch for CPUs its operators are missing, and on import it describes
    the shapes that these two give.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    import torch

    if torch.version.cuda is None and not version("torchvision").endswith("+cpu"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main(script: str, result: str, *options: str) -> None:
    """Run the script's ``main`` and write what it returned and how many seconds of a processor it took."""
    let_torchvision_import()
    if options:
        hidden = Hidden(list(options[1:]))
        sys.meta_path.insert(0, hidden)
        builtins.__import__ = hidden
    started = time.process_time()
    spec = importlib.util.spec_from_file_location("project_script", script)
    assert spec is not None
    assert spec.loader is not None
    project = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = project  # so that what it defines can be pickled
    spec.loader.exec_module(project)
    returned = project.main()
    seconds = time.process_time() - started
    Path(result).write_text(json.dumps({"returned": returned, "seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
