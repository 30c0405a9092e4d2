"""Install each package with nothing but its declared needs, and see that it works.

``python -m tools.alone [--whole] [name ...]``

For each package, in an environment of its own under .nox/alone: its wheel, the wheels of ours that it declares, and the
third-party libraries that those declare. In it every module is imported; then what its tests declare is added
(dependency group ``test``), and its tests and the Python blocks of its README run. Those that start many processes run
only with ``--whole``: they take long, and what a package imports the others show as well.

Torch is one gigabyte. It is installed once and lent by a .pth file to the packages that declare it; a package that does
not declare it cannot see it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tools.environment import python_of
from tools.wheels import build_all
from tools.workspace import CONSTRAINTS, ROOT, Package, closure, packages, requirement_name

HOME = ROOT / ".nox" / "alone"
TEST_TOOLS = ["pytest", "pytest-timeout"]
"""What the workspace's pytest settings need; a package's own group names everything else."""

AT_MOST_MB = {"fulmen-fabric": 5.0}
"""What a package may take on disk together with all that it brings, torch and what torch itself needs aside (but for
what both need). 1 MB is a million bytes."""

INSTALLED = """
import json, sys
from importlib.metadata import distribution
sizes = {}
for name in sys.argv[1:]:
    one = distribution(name)
    files = [one.locate_file(file) for file in one.files or ()]
    shipped = [file for file in files if file.suffix != ".pyc"]  # bytecode is Python's, if it is told to keep any
    sizes[name] = sum(file.stat().st_size for file in shipped if file.exists())
print(json.dumps(sizes))
"""

IMPORT_ALL = """
import importlib, pkgutil, sys
name = sys.argv[1]
package = importlib.import_module(name)
absent = []
for module in pkgutil.walk_packages(package.__path__, name + "."):
    if module.name.rpartition(".")[2] == "__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        told = type(error).__name__ == "MissingPackage" and "pip install" in str(error)
        # A path of Lightning's that is not here on purpose: importing it says why.
        parent, _, last = module.name.rpartition(".")
        if str(error).startswith(f"{parent} has no {last}"):
            continue
        # A private module may leave the telling to the public one that imports it (and torch to who hands it a model).
        private = any(part.startswith("_") for part in module.name.split("."))
        optional = str(error.name).partition(".")[0].lower().replace("_", "-") in ["torch", *sys.argv[3:]]
        if not told and not (private and optional):
            raise
        absent.append(module.name)
print("imported", name, "and its modules;", "not installed here: " + ", ".join(absent) if absent else "all of them")
if "torch" in sys.modules and sys.argv[2] == "without-torch":
    raise SystemExit(f"importing {name} imports torch, which it does not declare")
"""


@dataclass
class Report:
    """What happened to one package."""

    package: str
    output: list[str] = field(default_factory=list)
    failed: str | None = None
    seconds: float = 0.0


def site_packages(environment: Path) -> Path:
    """Where libraries are installed in a virtual environment."""
    if os.name == "nt":
        return environment / "Lib" / "site-packages"
    return environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def make(environment: Path, lend: list[Path]) -> None:
    """Make an empty environment, without pip or setuptools, that sees the libraries of the ``lend`` ones."""
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=False)
    (site_packages(environment) / "lent.pth").write_text("".join(f"{site_packages(other)}\n" for other in lend))


def install_command(environment: Path, requirements: list[str | Path]) -> list[str]:
    """The pip of this environment, working in the other one."""
    pip = [sys.executable, "-m", "pip", "--python", str(python_of(environment)), "install", "--quiet"]
    return [*pip, "--disable-pip-version-check", "-c", str(CONSTRAINTS), *map(str, requirements)]


def shared(name: str, requirements: list[str]) -> Path:
    """An environment that is lent to others; made once for each set of pins."""
    environment, stamp = HOME / f"shared-{name}", HOME / f"shared-{name}" / "stamp"
    wanted = "\n".join([*requirements, sys.version, CONSTRAINTS.read_text(encoding="utf-8")])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        make(environment, [])
        subprocess.run(install_command(environment, [*requirements]), check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return environment


def needs_torch(requirements: list[str]) -> bool:
    """Whether torch itself is among the requirements."""
    return any(requirement_name(requirement) == "torch" for requirement in requirements)


class Failed(Exception):
    """A step of one package failed; what it printed is in the report."""


def size_report(limit_mb: float, sizes: dict[str, int]) -> str:
    """One line on what is installed. Raises ``Failed`` where it is more than ``limit_mb``."""
    total = sum(sizes.values()) / 1e6
    parts = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sorted(sizes.items(), key=lambda item: -item[1]))
    line = f"installed without torch: {total:.2f} MB of {limit_mb:.0f} ({parts})"
    if total > limit_mb:
        raise Failed(f"size: {line}")
    return line


def check(package: Package, wheels: dict[str, Path], tools: Path, torch: Path, which: str) -> Report:
    """Take one package through all the steps, with the tests whose markers are ``which``."""
    report, started = Report(package.name), time.perf_counter()
    environment = HOME / package.name
    python = str(python_of(environment))

    def step(what: str, *command: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        env["PATH"] = str(python_of(environment).parent) + os.pathsep + os.environ["PATH"]
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)
        report.output.append(done.stdout + done.stderr)
        if done.returncode:
            raise Failed(what)

    everything = packages()
    ours, theirs = closure([package.name], everything)
    try:
        make(environment, [torch] if needs_torch(theirs) else [])
        step("install", *install_command(environment, [*[wheels[p.name] for p in ours], *theirs]))
        if package.name in AT_MOST_MB:
            names = [*(p.name for p in ours), *{requirement_name(one) for one in theirs} - {"torch"}]
            step("size", python, "-c", INSTALLED, *names)
            report.output[-1] = size_report(AT_MOST_MB[package.name], json.loads(report.output[-1]))
        visible = "with-torch" if needs_torch(theirs) else "without-torch"
        optional = [requirement_name(requirement) for requirement in package.optional_dependencies]
        step("import", python, "-c", IMPORT_ALL, package.module, visible, *optional)
        step("README", python, "tools/readme.py", "--at-least=1", str(package.path / "README.md"))

        tests = package.path / "tests"
        if any(tests.rglob("test_*.py")):
            more_ours, more_theirs = closure([package.name, *package.test_dependencies], everything)
            lend = [tools, *([torch] if needs_torch(more_theirs) else [])]
            (site_packages(environment) / "lent.pth").write_text("".join(f"{site_packages(e)}\n" for e in lend))
            step(
                "install for tests", *install_command(environment, [*[wheels[p.name] for p in more_ours], *more_theirs])
            )
            step("tests", python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(tests))
    except Failed as failure:
        report.failed = str(failure)
    report.seconds = time.perf_counter() - started
    return report


def main(names: list[str]) -> int:
    """Check the named packages, or all; two at a time; return 0 if every one works alone."""
    which = "not slow and not processes"
    if "--whole" in names:
        names, which = [name for name in names if name != "--whole"], "not slow"
    unknown = set(names) - {package.name for package in packages()}
    if unknown:
        raise SystemExit(f"no package is named {', '.join(sorted(unknown))}")
    chosen = [package for package in packages() if not names or package.name in names]
    HOME.mkdir(parents=True, exist_ok=True)
    print("Building the wheels, torch's environment and pytest's ...", flush=True)
    wheels = build_all(HOME / "wheels")
    tools, torch = shared("tests", TEST_TOOLS), shared("torch", ["torch"])
    reports = []
    with ThreadPoolExecutor(2) as pool:
        for report in pool.map(lambda package: check(package, wheels, tools, torch, which), chosen):
            print(f"===== {report.package} =====")
            print("\n".join(part.strip() for part in report.output if part.strip()), flush=True)
            reports.append(report)
    print("===== alone =====")
    for report in reports:
        state = f"FAILED at: {report.failed}" if report.failed else "works alone"
        print(f"{report.package:24} {report.seconds:5.0f} s  {state}")
    return int(any(report.failed for report in reports))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
