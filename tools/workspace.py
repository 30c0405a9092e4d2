"""Where things are in this repository, read from the files that say so. Standard library only."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints.txt"


@dataclass(frozen=True)
class Package:
    """One package of the workspace."""

    path: Path

    @property
    def name(self) -> str:
        """The distribution's name, which is also its folder's."""
        return self.path.name

    @property
    def module(self) -> str:
        """The name to import."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.path / "src"

    @property
    def pyproject(self) -> dict[str, object]:
        return tomllib.loads((self.path / "pyproject.toml").read_text(encoding="utf-8"))

    @property
    def dependencies(self) -> list[str]:
        """What it needs to run, as written in its pyproject."""
        return self.pyproject["project"].get("dependencies", [])  # type: ignore[index, union-attr, no-any-return]

    @property
    def optional_dependencies(self) -> list[str]:
        """What its extras bring."""
        extras: dict[str, list[str]] = self.pyproject["project"].get("optional-dependencies", {})  # type: ignore[index, union-attr]
        return [requirement for listed in extras.values() for requirement in listed]

    @property
    def test_dependencies(self) -> list[str]:
        """What its tests need beside that: its dependency group ``test``."""
        return group(self.pyproject, "test") if "test" in self.pyproject.get("dependency-groups", {}) else []  # type: ignore[operator]


def packages(root: Path = ROOT) -> list[Package]:
    """Every package of the workspace, sorted by name."""
    return [Package(file.parent) for file in sorted((root / "packages").glob("*/pyproject.toml"))]


def group(pyproject: dict[str, object], name: str) -> list[str]:
    """The requirements of one dependency group, included groups opened (PEP 735)."""
    groups: dict[str, list[str | dict[str, str]]] = pyproject.get("dependency-groups", {})  # type: ignore[assignment]
    if name not in groups:
        raise SystemExit(f"no dependency group is named {name!r}; there are: {', '.join(sorted(groups))}")
    found: list[str] = []
    for entry in groups[name]:
        found += [entry] if isinstance(entry, str) else group(pyproject, entry["include-group"])
    return list(dict.fromkeys(found))


def requirement_name(requirement: str) -> str:
    """``"fulmen-loggers[tensorboard]>=0.1,<0.2"`` -> ``"fulmen-loggers"``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} is not a requirement")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def closure(requirements: list[str], among: list[Package]) -> tuple[list[Package], list[str]]:
    """Split requirements, and those of the workspace's packages they name, into our packages and everything else.

    An extra that is asked for (``fulmen-loggers[tensorboard]``) brings its requirements too.
    """
    by_name = {package.name: package for package in among}
    ours: dict[str, Package] = {}
    theirs: list[str] = []
    open_ = list(requirements)
    seen: set[str] = set()
    while open_:
        requirement = open_.pop(0)
        if requirement in seen:
            continue
        seen.add(requirement)
        package = by_name.get(requirement_name(requirement))
        if package is None:
            theirs.append(requirement)
            continue
        if package.name not in ours:
            ours[package.name] = package
            open_ += package.dependencies
        extras = re.match(r"[A-Za-z0-9._-]+\[([^\]]*)\]", requirement)
        if extras is not None:
            offered: dict[str, list[str]] = package.pyproject["project"].get("optional-dependencies", {})  # type: ignore[index, union-attr]
            for extra in extras[1].split(","):
                open_ += offered[extra.strip()]
    return list(ours.values()), theirs
