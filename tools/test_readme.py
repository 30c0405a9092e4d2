"""Every Python block of every README and every page of the site runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.readme import blocks, run
from tools.workspace import ROOT, packages


def pages() -> list[Path]:
    """The files with Python blocks that a reader may copy."""
    candidates = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(p.path / "README.md" for p in packages())]
    return sorted(path for path in candidates if blocks(path.read_text(encoding="utf-8")))


def when(page: Path) -> list[pytest.MarkDecorator]:
    """A package's README is slow: ``alone`` runs it besides, with less installed."""
    return [pytest.mark.slow] if page.is_relative_to(ROOT / "packages") else []


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page.relative_to(ROOT)), marks=when(page)) for page in pages()]
)
def test_the_python_blocks_of_a_page_run_as_they_stand(page: Path) -> None:
    result = run(page)

    assert result.returncode == 0, f"{page.relative_to(ROOT)}:\n{result.stdout}{result.stderr}"
