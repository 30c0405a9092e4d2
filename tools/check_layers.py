"""Hold the import arrows of tools/layers.toml, and find import cycles: ``python -m tools.check_layers``."""

from __future__ import annotations

import os

from importlinter.cli import lint_imports

from tools import check_cycles
from tools.workspace import ROOT


def main() -> int:
    """Run both checks; return 0 if both are content."""
    os.chdir(ROOT)
    broken = lint_imports(config_filename="tools/layers.toml", no_cache=True, no_logo=True)
    return max(broken, check_cycles.main())


if __name__ == "__main__":
    raise SystemExit(main())
