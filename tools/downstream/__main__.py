"""Prove "change one import" on published libraries: ``python -m tools.downstream [name ...]``.

For each project in ``projects``, in an environment of its own below .nox/downstream, which borrows torch, Lightning and
the packages from the environment of this process: the library's sources are copied, the command of
docs/guides/from-lightning.md moves the copy (and the project's script) to fulmen, and the script runs twice with the
same seeds, once on Lightning, once on the copy with Lightning hidden. The numbers must agree to 1e-6, or to what a
second run on Lightning repeats to. Ends with a table in Markdown.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.alone import site_packages
from tools.downstream import compare, projects
from tools.downstream.move import move
from tools.environment import fingerprint, python_of
from tools.workspace import CONSTRAINTS, ROOT, requirement_name

HOME = ROOT / ".nox" / "downstream"
CHILD = Path(__file__).with_name("child.py")
KEPT = {"torch", "torchvision"}
"""What keeps its version even for a library that needs others than the development environment's."""
PROJECTS = sorted(file.stem for file in Path(projects.__path__[0]).glob("[a-z]*.py"))
SHOWN_LINES = 25


def first_sentence(text: str) -> str:
    """What a message says first, without the folders of this machine."""
    return re.split(r"(?<=\.)\s", text.replace(f"{HOME}{os.sep}", ""), maxsplit=1)[0].replace("|", "\\|")


class Failed(Exception):
    """A step of one project failed; the text is what it printed last."""


@dataclass
class Row:
    """What is known of one project."""

    project: str
    version: str = ""
    what: str = ""
    agrees: str = "does not run"
    refused: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: bool = True

    def markdown(self) -> str:
        """One line of the table."""
        refused = "; ".join(f"{name}: {first_sentence(why)}" for name, why in self.refused.items()) or "-"
        seconds = " / ".join(f"{self.seconds[name]:.0f}" for name in ("lightning", "fulmen") if name in self.seconds)
        return f"| {self.project} | {self.version} | {self.what} | {self.agrees} | {refused} | {seconds} |"


HEADER = """| Library | Version | What runs | Result | Refused | Processor seconds, Lightning / fulmen |
|---|---|---|---|---|---|"""


def ensure(name: str, requirements: list[str]) -> Path:
    """Make or update the environment of a project and return its Python."""
    environment, stamp = HOME / name, HOME / name / "stamp"
    lender = site_packages(Path(sys.prefix))
    wanted = fingerprint(str(lender), *requirements, CONSTRAINTS.read_text(encoding="utf-8"))
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python_of(environment)
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=False)
    # As a site folder, so that the packages there that are installed as editable are found too.
    (site_packages(environment) / "lent.pth").write_text(f"import site; site.addsitedir({str(lender)!r})\n")
    torch_alone = environment / "constraints.txt"
    pins = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    torch_alone.write_text("\n".join(line for line in pins if requirement_name(line) in KEPT) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python_of(environment)), "install", "--quiet"]
    for constraints in (CONSTRAINTS, torch_alone):
        command = [*pip, "--disable-pip-version-check", "-c", str(constraints), *requirements]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode == 0:
            break
    else:
        raise Failed(f"pip install {' '.join(requirements)}\n{done.stderr}")
    stamp.write_text(wanted, encoding="utf-8")
    return python_of(environment)


def sources(python: Path, package: str) -> Path:
    """Where a project's environment has a package, without importing it."""
    find = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)"
    done = subprocess.run([str(python), "-P", "-c", find, package], text=True, capture_output=True, check=False)
    if done.returncode:
        raise Failed(f"{package} is not installed by what REQUIRES names\n{done.stderr}")
    return Path(done.stdout.strip()).parent


def moved(python: Path, name: str, packages: list[str]) -> Path:
    """Copy the packages and the project's script, move the copies to fulmen, and return the folder."""
    folder = HOME / name / "moved"
    shutil.rmtree(folder, ignore_errors=True)
    for package in packages:
        shutil.copytree(sources(python, package), folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(projects.__path__[0]) / f"{name}.py", folder / "project_script.py")
    move(folder)
    return folder


def run(python: Path, name: str, kind: str, script: Path, path: Path | None, others: list[str]) -> dict[str, Any]:
    """Run a project's script in a folder of its own and return what the child wrote.

    With ``path``, the folder of what was moved, only the ``others`` can import Lightning.
    """
    folder = HOME / name / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path) if path else "", "PYTHONHASHSEED": "0"}
    result = folder / "result.json"
    command = [
        str(python),
        "-P",
        str(CHILD),
        str(script),
        str(result),
        *(["--hide-lightning", *others] if path else []),
    ]
    done = subprocess.run(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise Failed(f"on {kind}:\n" + "\n".join(done.stdout.splitlines()[-SHOWN_LINES:]))
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def constants(script: Path) -> dict[str, Any]:
    """The literals that a script assigns to names in capitals; it is not run, for it may import what it needs."""
    assigned = [node for node in ast.parse(script.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    names = {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}
    wanted = ("REQUIRES", "PACKAGES", "OTHERS", "WHAT")
    return {name: ast.literal_eval(value) for name, value in names.items() if name in wanted}


def check(name: str) -> Row:
    """Take one project through both runs."""
    script = Path(projects.__path__[0]) / f"{name}.py"
    project = constants(script)
    row = Row(name, what=project["WHAT"])
    try:
        python = ensure(name, project["REQUIRES"])
        row.version = installed_version(python, project["REQUIRES"][0])
        overlay = moved(python, name, project["PACKAGES"])
        theirs = run(python, name, "lightning", script, None, [])
        row.seconds["lightning"] = theirs["seconds"]
        ours = run(python, name, "fulmen", overlay / "project_script.py", overlay, project.get("OTHERS", []))
        row.seconds["fulmen"] = ours["seconds"]
        row.refused = compare.refusals(ours["returned"])
        apart = compare.differences(theirs["returned"], ours["returned"])
        if apart:
            again = run(python, name, "lightning-again", script, None, [])
            repeats = compare.differences(theirs["returned"], again["returned"])
            apart = {place: far for place, far in apart.items() if far > repeats.get(place, 0.0)}
    except Failed as failure:
        print(failure, flush=True)
        return row
    numbers = sum(1 for _ in compare.leaves(ours["returned"]))
    worst = sorted(apart.items(), key=lambda item: -item[1])
    for place, far in worst[:SHOWN_LINES]:
        print(f"{name}: {place} differs by {far:.3g}", flush=True)
    row.failed = bool(apart)
    row.agrees = f"differs in {len(apart)} of {numbers} values" if apart else f"agrees in {numbers} values"
    return row


def installed_version(python: Path, requirement: str) -> str:
    """The version of a distribution in a project's environment."""
    show = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    command = [str(python), "-P", "-c", show, requirement_name(requirement)]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


def main(names: list[str]) -> int:
    """Check the named projects, or all; return 0 if every one of them agrees."""
    unknown = set(names) - set(PROJECTS)
    if unknown:
        raise SystemExit(f"no project is named {', '.join(sorted(unknown))}; there are: {', '.join(PROJECTS)}")
    rows = []
    for name in names or PROJECTS:
        print(f"===== {name} =====", flush=True)
        rows.append(check(name))
    print(f"Lightning {version('lightning')}, torch {version('torch')}\n")
    print("\n".join([HEADER, *(row.markdown() for row in rows)]))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
