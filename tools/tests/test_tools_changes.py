"""The check of change fragments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tools.changes import problems
from tools.workspace import Package

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def package(tmp_path: Path) -> Package:
    (tmp_path / "p" / "changes").mkdir(parents=True)
    (tmp_path / "p" / "CHANGELOG.md").write_text("# Changelog\n\n<!-- towncrier release notes start -->\n")
    return Package(tmp_path / "p")


def test_a_package_without_release_needs_a_fragment(package: Package) -> None:
    assert "neither a release nor a fragment" in problems(package)[0]
    (package.path / "changes" / "+first.added.md").write_text("Add everything.\n")
    assert problems(package) == []


def test_a_released_package_needs_none(package: Package) -> None:
    with (package.path / "CHANGELOG.md").open("a") as file:
        file.write("\n## p 0.1.0\n\n- Add everything.\n")

    assert problems(package) == []


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [("note.md", "x", "name it"), ("+a.feature.md", "x", "name it"), ("12.fixed.md", " ", "is empty")],
)
def test_a_fragment_that_towncrier_would_lose_is_named(package: Package, name: str, text: str, told: str) -> None:
    (package.path / "changes" / name).write_text(text)

    [problem] = problems(package)

    assert name in problem
    assert told in problem
