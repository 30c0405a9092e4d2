"""Build a wheel of every package into dist/: ``python -m tools.wheels``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.workspace import ROOT, Package, packages

DIST = ROOT / "dist"


def build(package: Package, into: Path = DIST) -> Path:
    """Build one wheel and return it; older wheels of the same package are removed."""
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob(f"{package.module}-*.whl"):
        old.unlink()
    # Without isolation: the build tools are in the environment already, at the pinned versions.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "-w", str(into), str(package.path)], check=True)
    [wheel] = into.glob(f"{package.module}-*.whl")
    return wheel


def build_all(into: Path = DIST) -> dict[str, Path]:
    """Build every package; the wheel of each, by package name."""
    return {package.name: build(package, into) for package in packages()}


if __name__ == "__main__":
    for wheel in build_all().values():
        print(wheel.relative_to(ROOT))
    print("\nInstall for a project of your own: pip install --find-links dist fulmen")
