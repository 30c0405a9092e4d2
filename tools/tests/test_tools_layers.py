"""The import arrows: each contract catches the import it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools.workspace import ROOT, packages

FACADES = ("strategies", "loggers", "plugins", "accelerators")


def lint(folder: Path, **files: str) -> subprocess.CompletedProcess[str]:
    """Check the contracts on empty packages of the workspace's names, with these files in them."""
    for package in packages():
        (folder / package.module).mkdir()
        (folder / package.module / "__init__.py").touch()
    for facade in FACADES:
        (folder / "fulmen" / f"{facade}.py").write_text("import fulmen_strategies\n")
    (folder / "fulmen" / "trainer.py").touch()
    for name, text in files.items():
        path = folder / Path(*name.split("__")).with_suffix(".py")
        path.write_text(text)
    code = f"from importlinter.cli import lint_imports; raise SystemExit(lint_imports({str(ROOT / 'tools/layers.toml')!r}, no_cache=True, no_logo=True))"  # noqa: E501
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_what_the_design_allows_passes(tmp_path: Path) -> None:
    result = lint(
        tmp_path,
        fulmen_protocols__a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
        fulmen_loggers__a="import fulmen_protocols\nimport torch\n",
        fulmen_fabric__a="import fulmen_protocols\nimport fulmen_data\n",
        fulmen__a="import fulmen_protocols\nimport fulmen_data\nimport fulmen_fabric.a\n",
        fulmen__b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fulmen.trainer import Trainer\n",
    )

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("where", "imported"),
    [
        ("fulmen_protocols", "torch"),
        ("fulmen_protocols", "fulmen_data"),
        ("fulmen_loggers", "fulmen_checkpoint"),
        ("fulmen_data", "fulmen_strategies"),
        ("fulmen_conformance", "fulmen_strategies"),
        ("fulmen_precision", "fulmen_fabric"),
        ("fulmen_checkpoint", "fulmen"),
        ("fulmen_fabric", "fulmen_strategies"),
        ("fulmen_fabric", "fulmen"),
        ("fulmen", "fulmen_loggers"),
        ("fulmen", "fulmen_conformance"),
        ("fulmen", "fulmen.strategies"),
        ("fulmen", "fulmen.trainer"),
    ],
)
def test_what_the_design_forbids_is_caught_even_inside_a_function(tmp_path: Path, where: str, imported: str) -> None:
    result = lint(tmp_path, **{f"{where}__a": f"def lazy():\n    import {imported}\n"})

    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout
