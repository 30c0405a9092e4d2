"""The public API of each package as text, so that a change of it is reviewed like code.

``python -m tools.api`` compares with what is recorded, ``--write`` records.

packages/NAME/api.txt has one line for every public name: its kind, where it lives, its signature with types. Public is
what a public module lists in ``__all__`` (or, without one, defines without a leading underscore), and the public
members of its classes, with those from private bases of the same package. The sources are read, not imported, so the
text is the same on every machine.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import griffe

from tools.workspace import ROOT, Package, packages

HEAD = "# The public API of {name}. Written by `nox -s api -- --write`; reviewed like code.\n"


def load(package: Package) -> griffe.Module:
    """Read a package's source."""
    loader = griffe.GriffeLoader(search_paths=[package.source], allow_inspection=False)
    module = loader.load(package.module)
    if not isinstance(module, griffe.Module):
        raise TypeError(f"{package.module} was read as {type(module).__name__}, not as a module")
    return module


def describe(package: Package) -> str:
    """The text of api.txt."""
    lines = sorted(set(_module_lines(load(package))), key=lambda line: (line[10:], line))
    return HEAD.format(name=package.name) + "\n" + "".join(f"{line}\n" for line in lines)


def _public(name: str) -> bool:
    return not name.startswith("_")


def _module_lines(module: griffe.Module) -> list[str]:
    lines: list[str] = []
    exports = None if module.exports is None else {str(getattr(name, "name", name)) for name in module.exports}
    for name, member in module.members.items():
        if isinstance(member, griffe.Module):
            if _public(name):
                lines += _module_lines(member)
            continue
        if name not in exports if exports is not None else (not _public(name) or member.is_alias):
            continue
        lines += _member_lines(f"{module.path}.{name}", member)
    for name in sorted((exports or set()) - set(module.members)):
        lines.append(f"lazy      {module.path}.{name}")  # supplied by the module's __getattr__
    return lines


def _member_lines(path: str, member: griffe.Object | griffe.Alias) -> list[str]:
    if isinstance(member, griffe.Alias):
        return [f"alias     {path} = {member.target_path}"]
    if isinstance(member, griffe.Class):
        bases = f"({', '.join(_text(base) for base in member.bases)})" if member.bases else ""
        lines = [f"class     {path}{bases}{_decorators(member)}"]
        for name, inner in _members(member).items():
            if (_public(name) or name in SPECIAL) and not inner.is_alias:
                lines += _member_lines(f"{path}.{name}", inner)
        return lines
    if isinstance(member, griffe.Function):
        return [f"function  {path}{_signature(member)}{_decorators(member)}"]
    if isinstance(member, griffe.Attribute):
        kind = "property " if "property" in member.labels else "attribute"
        annotation = f": {_text(member.annotation)}" if member.annotation is not None else ""
        return [f"{kind} {path}{annotation}{' (settable)' if 'writable' in member.labels else ''}"]
    return [f"name      {path}"]


def _members(kind: griffe.Class) -> dict[str, griffe.Object | griffe.Alias]:
    """A class's own members and those of its private bases, unless they are recorded with a public base."""
    bases = kind.mro()
    public = [base for base in bases if all(map(_public, base.path.split(".")))]
    recorded = {base.path for base in public} | {inner.path for base in public for inner in base.mro()}
    found: dict[str, griffe.Object | griffe.Alias] = {}
    for base in [*reversed(bases), kind]:
        if base.path not in recorded:
            found |= base.members
    return found


SPECIAL = {"__init__", "__call__", "__enter__", "__exit__", "__iter__", "__next__", "__len__", "__getitem__"}


def _text(expression: object) -> str:
    return " ".join(str(expression).split())


def _decorators(member: griffe.Class | griffe.Function) -> str:
    told = [_text(decorator.value) for decorator in member.decorators]
    told = [text for text in told if text.partition("(")[0].rpartition(".")[2] not in ("wraps",)]
    return f"  @{' @'.join(told)}" if told else ""


def _signature(function: griffe.Function) -> str:
    parts: list[str] = []
    kinds = griffe.ParameterKind
    listed = list(function.parameters)
    for place, parameter in enumerate(listed):
        before = listed[place - 1].kind if place else None
        if before is kinds.positional_only and parameter.kind is not kinds.positional_only:
            parts.append("/")
        if parameter.kind is kinds.keyword_only and before not in (kinds.keyword_only, kinds.var_positional):
            parts.append("*")
        star = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(parameter.kind, "") if parameter.kind else ""
        text = star + parameter.name
        if parameter.annotation is not None:
            text += f": {_text(parameter.annotation)}"
        if parameter.default is not None and not star:
            text += f" = {_text(parameter.default)}"
        parts.append(text)
    if listed and listed[-1].kind is kinds.positional_only:
        parts.append("/")
    returns = f" -> {_text(function.returns)}" if function.returns is not None else ""
    return f"({', '.join(parts)}){returns}"


def difference(recorded: str, found: str, name: str) -> str:
    """What changed, as a unified diff without context; empty if nothing did."""
    rows = difflib.unified_diff(
        recorded.splitlines(), found.splitlines(), f"{name} recorded", f"{name} now", n=0, lineterm=""
    )
    return "\n".join(rows)


def main(args: list[str], listed: list[Package] | None = None) -> int:
    """Compare, or with ``--write`` record; return 0 if what is recorded is what is there."""
    write = "--write" in args
    changed = False
    for package in packages() if listed is None else listed:
        file: Path = package.path / "api.txt"
        found = describe(package)
        recorded = file.read_text(encoding="utf-8") if file.exists() else ""
        if found == recorded:
            continue
        changed = True
        if write:
            file.write_text(found, encoding="utf-8")
            print(f"wrote {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}")
        else:
            print(difference(recorded, found, f"{package.name}/api.txt"))
    if changed and not write:
        print("\nThe public API differs from what is recorded. If that is meant: nox -s api -- --write, and commit it.")
    if not changed:
        print("The public API of every package is as recorded.")
    return int(changed and not write)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
