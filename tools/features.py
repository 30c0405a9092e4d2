"""Say in docs/features.md which tests prove which item: ``python -m tools.features [--write]``.

A test states what it proves: ``@pytest.mark.proves("9.26")``. The tests are read, not run; that they pass is the
business of ``nox -s tests``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.workspace import ROOT

PAGE = ROOT / "docs" / "features.md"
ROW = re.compile(r"^\| (?P<item>(?:\d+|A)\.\d+) \| (?P<text>.*) \| (?P<status>[^|]*) \|$", re.MULTILINE)
NONE = "no test yet"


def items(page: str) -> list[str]:
    """The numbers of the page's items, in order."""
    return [match["item"] for match in ROW.finditer(page)]


def claims(source: str) -> Iterator[tuple[str, str]]:
    """Pairs (item, name of the test) that a test file states. A mark on a class or a module counts as one claim."""

    def walk(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inner = child.name if named else owner  # type: ignore[attr-defined]
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr == "proves":
                for argument in child.args:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield argument.value, owner
            yield from walk(child, inner)

    yield from walk(ast.parse(source), "the whole file")


def test_files() -> list[Path]:
    """Every file that may hold tests."""
    folders = [*sorted((ROOT / "packages").glob("*/tests")), ROOT / "integration_tests", ROOT / "tools" / "tests"]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def proofs() -> dict[str, dict[str, set[str]]]:
    """Item -> file, relative to the repository -> names of the tests in it."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in test_files():
        for item, test in claims(path.read_text(encoding="utf-8")):
            found.setdefault(item, {}).setdefault(path.relative_to(ROOT).as_posix(), set()).add(test)
    return found


def filled(page: str, proved: dict[str, dict[str, set[str]]]) -> str:
    """The page with its status column made anew."""

    def row(match: re.Match[str]) -> str:
        files = proved.get(match["item"], {})
        count = sum(len(tests) for tests in files.values())
        names = ", ".join(f"`{Path(file).stem}`" for file in sorted(files))
        status = f"{count} test{'s' if count > 1 else ''}: {names}" if files else NONE
        return f"| {match['item']} | {match['text']} | {status} |"

    return ROW.sub(row, page)


def main(args: list[str]) -> int:
    """Write the page, or say what it would hold; return 0 unless a test names an item that does not exist."""
    page = PAGE.read_text(encoding="utf-8")
    listed, proved = items(page), proofs()
    for item in sorted(set(proved) - set(listed)):
        print(f"{', '.join(proved[item])}: there is no item {item} in {PAGE.relative_to(ROOT)}")
    print(f"{len(set(proved) & set(listed))} of {len(listed)} items are proved by a test.")
    if "--write" in args:
        PAGE.write_text(filled(page, proved), encoding="utf-8")
    return int(bool(set(proved) - set(listed)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
