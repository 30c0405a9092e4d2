"""Install torch-xla from nothing, with the torch that it is for, and test on its CPU runtime: ``python -m tools.xla``.

[pytest arguments ...] replace the tests that are run. The environment is .nox/xla; it holds no NVIDIA library (see
``tools.cuda_stubs``), so it is good for the CPU only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

from tools import cuda_stubs
from tools.alone import site_packages
from tools.environment import fingerprint, python_of
from tools.workspace import CONSTRAINTS, ROOT, closure, group, packages, requirement_name

HOME = ROOT / ".nox" / "xla"
PAIR = ["torch==2.9.1", "torch_xla==2.9.0"]
"""torch_xla names the minor version of torch that it was built for."""
NEEDED = [
    "typing_extensions",
    "filelock",
    "sympy",
    "networkx",
    "jinja2",
    "fsspec",
    "numpy",
    "absl-py",
    "pyyaml",
    "requests",
]
"""What the pair needs on a CPU; its own metadata would bring CUDA."""
TESTED = ["fulmen", "fulmen-xla", "fulmen-conformance"]
ON_THE_OLDEST_TORCH = ["fulmen-checkpoint", "fulmen-fabric", "fulmen-strategies"]
"""Tested there too, by ``tools.oldest``."""
WITHOUT_THEIR_NEEDS = ["torchmetrics", "lightning-utilities"]
"""With them pip would bring torch's, which are CUDA's."""
OF_ANOTHER_TORCH = {"torch", "torchmetrics", "torchao", "bitsandbytes", "lightning", "pytorch-lightning"}
ONE_DEVICE = ["packages/fulmen-xla/tests", "integration_tests/test_xla_training.py"]
FOUR_DEVICES = ["packages/fulmen-xla/tests/test_conformance_xla_spmd.py"]


def pip(python: Path, *arguments: str | Path) -> None:
    """Install without anything that was not named."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def requirements() -> list[str]:
    """Third-party libraries of the packages under test and of their tests."""
    tests = [one for package in packages() if package.name in ON_THE_OLDEST_TORCH for one in package.test_dependencies]
    _, theirs = closure([*TESTED, *ON_THE_OLDEST_TORCH, *tests], packages())
    wanted = {
        requirement_name(one): one for one in [*theirs, *NEEDED, "pytest", "pytest-timeout", "hypothesis", "psutil"]
    }
    return [one for name, one in sorted(wanted.items()) if name not in OF_ANOTHER_TORCH]


def ensure() -> Path:
    """Make or update the environment and return its Python."""
    python, stamp = python_of(HOME), HOME / "fulmen-stamp"
    listed = requirements()
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = group(root, "build")
    projects = [package.path / "pyproject.toml" for package in packages()]
    wanted = fingerprint(*PAIR, *listed, *build, CONSTRAINTS.read_text(), *(file.read_text() for file in projects))
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print("Making .nox/xla (once; torch for CUDA is large) ...", flush=True)
    venv.create(HOME, with_pip=True, clear=True)
    pip(python, "--no-deps", *PAIR)
    pins = HOME / "constraints.txt"
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines(keepends=True)
    pins.write_text(
        "".join(line for line in lines if line.startswith("#") or requirement_name(line) not in OF_ANOTHER_TORCH)
    )
    pip(python, "-c", pins, *listed, *build)
    pip(python, "--no-deps", "-c", CONSTRAINTS, *WITHOUT_THEIR_NEEDS)
    editable = [part for package in packages() for part in ("-e", package.path)]
    pip(python, "--no-deps", "--no-build-isolation", *editable)
    cuda_stubs.make(site_packages(HOME) / "torch" / "lib", HOME / "stubs")
    stamp.write_text(wanted)
    return python


def environment(**more: str) -> dict[str, str]:
    """Variables under which torch-xla runs there."""
    # torch_xla is linked against libpython itself.
    folders = [str(HOME / "stubs"), str(sysconfig.get_config_var("LIBDIR")), os.environ.get("LD_LIBRARY_PATH", "")]
    own = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders)), "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


def main(arguments: list[str]) -> int:
    """Run the tests; those of four devices in a process of their own, for a process has one mode."""
    python = ensure()
    whole: list[tuple[list[str], dict[str, str]]] = [(ONE_DEVICE, {}), (FOUR_DEVICES, {"CPU_NUM_DEVICES": "4"})]
    runs = [(arguments, {})] if arguments else whole
    failed = 0
    for paths, more in runs:
        command = [str(python), "-m", "pytest", "-m", "slow or not slow", *paths]
        failed |= subprocess.run(command, cwd=ROOT, env=environment(**more), check=False).returncode
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
