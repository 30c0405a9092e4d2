"""What the tools read from the workspace, and the files that list its packages."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest
from tools.environment import fingerprint, missing
from tools.workspace import CONSTRAINTS, ROOT, Package, closure, group, packages, requirement_name

if TYPE_CHECKING:
    from pathlib import Path


def test_every_package_has_the_shape_of_a_package() -> None:
    listed = packages()

    assert "fulmen-protocols" in [package.name for package in listed]
    for package in listed:
        for name in (
            "README.md",
            "CHANGELOG.md",
            f"src/{package.module}/__init__.py",
            f"src/{package.module}/py.typed",
        ):
            assert (package.path / name).is_file(), f"{package.name} lacks {name}"


def test_dependencies_among_ours_are_ranges_and_never_pins() -> None:
    for package in packages():
        for requirement in package.dependencies:
            assert "==" not in requirement, f"{package.name} pins {requirement}"


def test_the_layers_know_every_package() -> None:
    layers = tomllib.loads((ROOT / "tools" / "layers.toml").read_text())["tool"]["importlinter"]

    assert sorted(layers["root_packages"]) == sorted(package.module for package in packages())


def test_torch_is_pinned_for_development() -> None:
    assert "torch==2.13.0" in CONSTRAINTS.read_text().splitlines()


def test_groups_open_the_groups_they_include() -> None:
    table: dict[str, object] = {"dependency-groups": {"a": ["x", {"include-group": "b"}], "b": ["y>=1", "x"]}}

    assert group(table, "a") == ["x", "y>=1"]
    with pytest.raises(SystemExit, match="no dependency group is named 'c'; there are: a, b"):
        group(table, "c")


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("Torch>=2.9", "torch"), ("fulmen_loggers[tensorboard]>=0.1,<0.2", "fulmen-loggers"), ("PyYAML", "pyyaml")],
)
def test_a_requirement_is_known_by_its_normal_name(requirement: str, name: str) -> None:
    assert requirement_name(requirement) == name


def fake(folder: Path, name: str, dependencies: list[str], extras: dict[str, list[str]] | None = None) -> Package:
    path = folder / name
    path.mkdir()
    rows = [f"{key} = {value!r}" for key, value in (extras or {}).items()]
    text = [f'[project]\nname = "{name}"\ndependencies = {dependencies!r}', "[project.optional-dependencies]", *rows]
    (path / "pyproject.toml").write_text("\n".join(text))
    return Package(path)


def test_a_closure_follows_ours_and_their_extras_and_nothing_that_was_not_asked_for(tmp_path: Path) -> None:
    base = fake(tmp_path, "base", ["numpy>=1"])
    middle = fake(tmp_path, "middle", ["base>=0.1"], {"fast": ["numba"], "slow": ["scipy"]})
    top = fake(tmp_path, "top", ["middle[fast]>=0.1", "torch>=2.9"])
    other = fake(tmp_path, "other", ["never"])

    ours, theirs = closure(["top"], [base, middle, top, other])

    assert [package.name for package in ours] == ["top", "middle", "base"]
    assert theirs == ["torch>=2.9", "numba", "numpy>=1"]


def test_an_environment_is_updated_where_its_stamp_differs() -> None:
    wanted = {"test": fingerprint("pytest"), "docs": fingerprint("mkdocs"), "packages": fingerprint("a")}

    assert missing(wanted, wanted) == []
    assert missing(wanted, {**wanted, "docs": fingerprint("mkdocs", "more")}) == ["docs"]
    assert missing(wanted, {}) == ["test", "docs", "packages"]
