"""Say in docs/features.md which tests prove which item: ``python -m tools.features [--check]``.

A test states what it proves: ``@pytest.mark.proves("9.26")``. What deliberately works otherwise than in Lightning, or
is refused, has a row in docs/differences.md that names the item: ``(item 9.19)``. In the areas that are said to be
whole, an item with neither is an error. The tests are read, not run: that they pass is for ``nox -s tests`` to say.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from tools.workspace import ROOT

PAGE = ROOT / "docs" / "features.md"
DIFFERENCES = ROOT / "docs" / "differences.md"
WHOLE_AREAS = ("6", "8", "9", "10", "11", "12", "13")
"""Areas in which every item is proved or explained."""
ROW = re.compile(r"^\| (?P<item>(?:\d+|A)\.\d+) \| (?P<text>.*) \| (?P<status>[^|]*) \|$", re.MULTILINE)
EXPLAINED = re.compile(r"\(items? (?P<items>(?:\d+|A)\.\d+(?:(?:, | and )(?:\d+|A)\.\d+)*)\)")
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


def explained(differences: str) -> set[str]:
    """The items that docs/differences.md names."""
    return {item for match in EXPLAINED.finditer(differences) for item in re.findall(r"\d+\.\d+", match["items"])}


def filled(page: str, proved: dict[str, dict[str, set[str]]], differing: Collection[str] = ()) -> str:
    """The page with its status column made anew."""

    def row(match: re.Match[str]) -> str:
        files = proved.get(match["item"], {})
        count = sum(len(tests) for tests in files.values())
        links = ", ".join(f"[{Path(file).stem}]({os.path.join('..', file)})" for file in sorted(files))
        parts = [f"{count} test{'s' if count > 1 else ''}: {links}"] if files else []
        if match["item"] in differing:
            parts.append("see [differences](differences.md)")
        return f"| {match['item']} | {match['text']} | {'; '.join(parts) or NONE} |"

    return ROW.sub(row, page)


def without_links_to_tests(page: str) -> str:
    """The page for the site, which holds no tests."""
    return re.sub(r"\[(\w+)\]\(\.\./[^)]+\.py\)", r"`\1`", page)


def main(args: list[str]) -> int:
    """Write the page, or with ``--check`` compare; return 0 if every claim and every item of a whole area holds."""
    page = PAGE.read_text(encoding="utf-8")
    listed, proved = items(page), proofs()
    differing = explained(DIFFERENCES.read_text(encoding="utf-8"))
    problems = [
        f"{', '.join(proved[item])}: there is no item {item} in {PAGE.relative_to(ROOT)}"
        for item in sorted(set(proved) - set(listed))
    ]
    problems += [
        f"docs/differences.md names item {item}, which does not exist" for item in sorted(differing - set(listed))
    ]
    problems += [
        f"item {item} has no test and no row in docs/differences.md"
        for item in listed
        if item.partition(".")[0] in WHOLE_AREAS and item not in proved and item not in differing
    ]
    made = filled(page, proved, differing)
    if "--check" not in args:
        PAGE.write_text(made, encoding="utf-8")
    elif made != page:
        problems.append(f"{PAGE.relative_to(ROOT)} is out of date: python -m nox -s features")
    for problem in problems:
        print(problem)
    print(f"{len(set(proved) & set(listed))} of {len(listed)} items are proved by a test.")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
