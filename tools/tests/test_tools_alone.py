"""What the check of a package by itself imports, and what it takes for an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tools.alone import AT_MOST_MB, IMPORT_ALL, INSTALLED, Failed, needs_torch, size_report
from tools.workspace import closure, packages, requirement_name


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


def test_fabric_brings_no_trainer_no_callbacks_and_no_logger() -> None:
    ours, theirs = closure(["fulmen-fabric"], packages())

    assert {package.name for package in ours} == {
        *("fulmen-fabric", "fulmen-protocols", "fulmen-accelerators", "fulmen-precision", "fulmen-strategies"),
        *("fulmen-checkpoint", "fulmen-data"),
    }
    assert {requirement_name(one) for one in theirs} == {"torch", "fsspec"}


def test_what_fabric_brings_stays_small_fsspec_included() -> None:
    ours, _ = closure(["fulmen-fabric"], packages())
    sources = sum(file.stat().st_size for package in ours for file in package.source.rglob("*.py"))
    done = subprocess.run([sys.executable, "-c", INSTALLED, "fsspec"], capture_output=True, text=True, check=True)
    [fsspec] = json.loads(done.stdout).values()

    # Installing compiles each module, to about its size again; tools.alone measures what is really installed.
    assert 2 * sources + fsspec < AT_MOST_MB["fulmen-fabric"] * 1e6


def test_more_than_the_limit_is_a_failure_that_names_the_parts() -> None:
    assert size_report(5.0, {"a": 3_000_000, "b": 1_000_000}).startswith(
        "installed without torch: 4.00 MB of 5 (a 3.00"
    )
    with pytest.raises(Failed, match=r"5\.50 MB of 5 \(b 4\.50, a 1\.00\)"):
        size_report(5.0, {"a": 1_000_000, "b": 4_500_000})
