"""What the check of a package by itself imports, and what it takes for an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.alone import IMPORT_ALL, needs_torch


def import_all(folder: Path, *optional: str, **modules: str) -> subprocess.CompletedProcess[str]:
    (folder / "pkg").mkdir()
    for name, text in {"__init__": "", **modules}.items():
        (folder / "pkg" / f"{name}.py").write_text(text)
    command = [sys.executable, "-c", IMPORT_ALL, "pkg", "without-torch", *optional]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_module_is_imported_and_an_absent_optional_library_is_told(tmp_path: Path) -> None:
    missing = "class MissingPackage(ImportError): ...\nraise MissingPackage('x needs y: pip install y')"

    result = import_all(tmp_path, a="", b=missing, __main__="raise SystemExit(9)")

    assert result.returncode == 0, result.stderr
    assert "not installed here: pkg.b" in result.stdout


def test_an_undeclared_library_is_an_error(tmp_path: Path) -> None:
    result = import_all(tmp_path, a="import no_such_library_anywhere")

    assert result.returncode == 1
    assert "no_such_library_anywhere" in result.stderr


def test_only_a_private_module_may_import_an_optional_library_bare(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()

    private = import_all(tmp_path / "1", "absent-lib", _a="import Absent_Lib.part")
    public = import_all(tmp_path / "2", "absent-lib", a="import Absent_Lib.part")

    assert private.returncode == 0, private.stderr
    assert public.returncode == 1


def test_a_package_that_does_not_declare_torch_may_not_import_it(tmp_path: Path) -> None:
    fake = "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')"

    result = import_all(tmp_path, a=fake)

    assert result.returncode == 1
    assert "imports torch, which it does not declare" in result.stderr


def test_torch_is_lent_only_to_who_names_it() -> None:
    assert needs_torch(["numpy", "torch>=2.9"])
    assert not needs_torch(["torchmetrics", "numpy"])
