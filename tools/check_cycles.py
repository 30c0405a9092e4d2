"""Find import cycles inside each package, lazy imports included: ``python -m tools.check_cycles``.

An import inside a function counts: it hides a cycle and does not remove it. One under ``TYPE_CHECKING`` does not: it
never runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tools.workspace import packages


def modules(source: Path, package: str) -> dict[str, Path]:
    """Every module of ``package`` under the folder ``source``, by dotted name."""
    found = {}
    for path in sorted((source / package).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield from _import_nodes(ast.Module([other], []))
        else:
            yield from _import_nodes(child)


def imports(path: Path, name: str, known: Iterable[str]) -> set[str]:
    """Which of the ``known`` modules the module ``name`` in the file ``path`` imports when its code runs.

    ``from package import x`` means the submodule ``package.x`` if there is one, else ``package`` itself.
    """
    names = set(known)
    is_package = path.name == "__init__.py"
    found: set[str] = set()
    for node in _import_nodes(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
            continue
        base = node.module or ""
        if node.level:
            anchor = name.split(".")
            anchor = anchor[: len(anchor) - node.level + is_package]
            base = ".".join([*anchor, *([node.module] if node.module else [])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            found |= {submodule} if submodule in names else {base} & names
    return found - {name}


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components with more than one member, each sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == node:
                    break
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def package_cycles(source: Path, package: str) -> list[list[str]]:
    """The import cycles of one package."""
    paths = modules(source, package)
    return cycles({name: imports(path, name, paths) for name, path in paths.items()})


def main() -> int:
    """Check every package; print the cycles; return 0 if there is none."""
    failed = False
    for package in packages():
        for cycle in package_cycles(package.source, package.module):
            failed = True
            print(
                f"{package.name}: these modules import each other, directly or through one another: {', '.join(cycle)}"
            )
    if not failed:
        print(f"No import cycle in {len(packages())} packages.")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
