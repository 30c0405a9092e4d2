"""The text of the public API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tools.api import describe, main
from tools.workspace import Package

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = '''
from __future__ import annotations
from os import path
from dataclasses import dataclass

__all__ = ["Thing", "make", "SIZE"]

SIZE: int = 3
hidden = 4

class Thing(Base):
    """A thing."""

    colour: str = "red"

    def __init__(self, a: int, /, b: str = "x", *args: float, c: bool, **rest: object) -> None: ...
    def _private(self): ...
    @property
    def area(self) -> float: ...
    @staticmethod
    def at(x, *, y=1): ...

def make(n: int | None = None) -> Thing: ...
def not_exported(): ...
'''


@pytest.fixture
def package(tmp_path: Path) -> Package:
    folder = tmp_path / "thing-box"
    module = folder / "src" / "thing_box"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text('from thing_box.things import Thing\n__all__ = ["Thing", "lazily"]\n')
    (module / "things.py").write_text(SOURCE)
    (module / "_inner.py").write_text("def secret(): ...\n")
    return Package(folder)


def test_the_text_holds_public_names_with_signatures_and_nothing_else(package: Package) -> None:
    text = describe(package)

    assert text.split("\n\n", 1)[1].splitlines() == [
        "alias     thing_box.Thing = thing_box.things.Thing",
        "lazy      thing_box.lazily",
        "attribute thing_box.things.SIZE: int",
        "class     thing_box.things.Thing(Base)",
        "function  thing_box.things.Thing.__init__"
        "(self, a: int, /, b: str = 'x', *args: float, c: bool, **rest: object) -> None",
        "property  thing_box.things.Thing.area: float",
        "function  thing_box.things.Thing.at(x, *, y = 1)  @staticmethod",
        "attribute thing_box.things.Thing.colour: str",
        "function  thing_box.things.make(n: int | None = None) -> Thing",
    ]


def test_members_from_a_private_base_are_public_members_of_the_class(package: Package) -> None:
    source = package.source / "thing_box"
    (source / "_inner.py").write_text(
        "class Base:\n    size = 1\n    def grow(self, by: int): ...\n    def _hide(self): ...\n"
    )
    (source / "things.py").write_text(
        "from thing_box._inner import Base\nclass Thing(Base):\n    def grow(self): ...\nclass Big(Thing):\n    pass\n"
    )

    lines = describe(package).splitlines()

    assert "attribute thing_box.things.Thing.size" in lines
    assert "function  thing_box.things.Thing.grow(self)" in lines, "what the class defines itself wins"
    assert not any("_hide" in line or "_inner" in line for line in lines)
    assert not any("things.Big." in line for line in lines), "what a public base has is recorded there"


def test_a_changed_default_is_a_difference_until_it_is_written(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--write"], [package]) == 0
    assert main([], [package]) == 0
    module = package.source / "thing_box" / "things.py"
    module.write_text(module.read_text().replace("n: int | None = None", "n: int | None = 7"))

    code = main([], [package])

    output = capsys.readouterr().out
    assert code == 1
    assert "-function  thing_box.things.make(n: int | None = None) -> Thing" in output
    assert "+function  thing_box.things.make(n: int | None = 7) -> Thing" in output
    assert "nox -s api -- --write" in output
    assert main(["--write"], [package]) == 0
    assert main([], [package]) == 0
