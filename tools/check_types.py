"""Run mypy and pyright, both strict, on every package's source: ``python -m tools.check_types [package ...]``.

And on integration_tests/typed_*.py, which say what a user's type checker must know of what we return.
"""

from __future__ import annotations

import subprocess
import sys

from tools.workspace import ROOT, packages


def main(names: list[str]) -> int:
    """Return 0 if both accept everything. Both run even when the first complains."""
    sources = [str(p.source.relative_to(ROOT)) for p in packages() if not names or p.name in names]
    sources += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "integration_tests").glob("typed_*.py"))]
    failed = [
        command[0]
        for command in (["mypy", *sources], ["pyright", "--pythonpath", sys.executable, *sources])
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
    ]
    print(f"types: {' and '.join(failed)} found errors" if failed else "types: mypy and pyright are content")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
