"""Make ``.nox/dev``, the one environment that the nox sessions share: the packages, editable, and what a session needs.

``python -m tools.environment demo test`` installs those dependency groups of the root pyproject.toml unless they are
there already; ``--at .nox/loggers`` makes another environment. Standard library only: it must run on a machine that has
nothing but Python and pip.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from tools.workspace import CONSTRAINTS, ROOT, group, packages

DEV = ROOT / ".nox" / "dev"
OLDEST_PYTHON = (3, 11)


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip_install(python: Path, *arguments: str | Path) -> None:
    """Install with the pinned versions: without the constraints a later install could move torch."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-c", CONSTRAINTS, *arguments]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def fingerprint(*texts: str) -> str:
    """A short digest of what an installation depends on."""
    return hashlib.sha256("\0".join([sys.version, *texts]).encode()).hexdigest()[:16]


def missing(wanted: dict[str, str], stamp: dict[str, str]) -> list[str]:
    """The keys of ``wanted`` whose digest differs from what the stamp says is installed."""
    return [name for name, digest in wanted.items() if stamp.get(name) != digest]


def ensure(groups: list[str], environment: Path = DEV) -> Path:
    """Make or update the environment and return its Python."""
    if sys.version_info < OLDEST_PYTHON:
        raise SystemExit(f"fulmen needs Python >= 3.11; this is {sys.version.split()[0]} ({sys.executable})")
    pins = CONSTRAINTS.read_text(encoding="utf-8")
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = {name: group(root, name) for name in ["build", *groups]}
    wanted = {name: fingerprint(pins, *listed) for name, listed in requirements.items()}
    wanted["packages"] = fingerprint(
        pins, *[(p.path / "pyproject.toml").read_text(encoding="utf-8") for p in packages()]
    )

    stamp_file = environment / "fulmen-stamp.json"
    stamp: dict[str, str] = json.loads(stamp_file.read_text(encoding="utf-8")) if stamp_file.exists() else {}
    outdated = missing(wanted, stamp)
    python = python_of(environment)
    if not outdated and python.exists():
        return python

    if not python.exists():
        print(f"Making {environment.relative_to(ROOT)} (once; some minutes) ...", flush=True)
        venv.create(environment, with_pip=True, clear=True)
        stamp, outdated = {}, list(wanted)
    if "build" in outdated:
        pip_install(python, *requirements["build"])
    others = [name for name in outdated if name not in ("build", "packages")]
    if others or "packages" in outdated:
        listed = packages() if "packages" in outdated else []
        print(f"Installing {', '.join([p.name for p in listed] + others)} ...", flush=True)
        editable = [part for package in listed for part in ("-e", package.path)]
        # Together in one call, so that pip sees every requirement on a package at once.
        pip_install(python, "--no-build-isolation", *editable, *[r for name in others for r in requirements[name]])
    stamp_file.write_text(json.dumps(stamp | wanted, indent=1), encoding="utf-8")
    return python


if __name__ == "__main__":
    arguments = sys.argv[1:]
    at = ROOT / arguments[arguments.index("--at") + 1] if "--at" in arguments else DEV
    print(ensure([name for name in arguments if name != "--at" and ROOT / name != at], at))
