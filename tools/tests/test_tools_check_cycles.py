"""The search for import cycles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tools.check_cycles import cycles, package_cycles

if TYPE_CHECKING:
    from pathlib import Path


def package(folder: Path, **modules: str) -> Path:
    (folder / "pkg" / "sub").mkdir(parents=True)
    for name, text in {"__init__": "", "sub/__init__": "", **modules}.items():
        (folder / "pkg" / f"{name}.py").write_text(text)
    return folder


def test_a_chain_of_imports_is_no_cycle(tmp_path: Path) -> None:
    source = package(tmp_path, a="from pkg import b", b="import pkg.c", c="import os")

    assert package_cycles(source, "pkg") == []


@pytest.mark.parametrize(
    "back",
    [
        "import pkg.a",
        "from pkg.a import x",
        "from . import a",
        "from .a import x",
        "def lazy():\n    from pkg.a import x",
        "class C:\n    def m(self):\n        if self:\n            import pkg.a",
        "try:\n    import pkg.a\nexcept ImportError:\n    pass",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import pkg.a",
    ],
)
def test_every_way_of_importing_back_closes_a_cycle(tmp_path: Path, back: str) -> None:
    source = package(tmp_path, a="from pkg import b", b=back)

    assert package_cycles(source, "pkg") == [["pkg.a", "pkg.b"]]


def test_an_import_for_type_checkers_only_closes_none(tmp_path: Path) -> None:
    back = "import typing\nif typing.TYPE_CHECKING:\n    from pkg.a import x"
    source = package(tmp_path, a="from pkg import b", b=back)

    assert package_cycles(source, "pkg") == []


def test_a_module_that_imports_its_own_package_closes_a_cycle_through_the_init(tmp_path: Path) -> None:
    source = package(tmp_path, __init__="from pkg.a import x", a="from pkg import y")

    assert package_cycles(source, "pkg") == [["pkg", "pkg.a"]]


def test_relative_imports_of_a_subpackage_are_resolved_from_where_they_stand(tmp_path: Path) -> None:
    source = package(tmp_path, **{"sub/__init__": "from ..a import x", "a": "from .sub import y"})

    assert package_cycles(source, "pkg") == [["pkg.a", "pkg.sub"]]


def test_separate_cycles_are_told_separately() -> None:
    graph = {"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"a"}}

    assert cycles(graph) == [["a", "b"], ["c", "d", "e"]]
