"""Names that people look for in a module and that are elsewhere, or not there on purpose."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fulmen_protocols import MissingPackage

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["elsewhere", "not_here"]


def not_here(module: str, name: str, refused: Mapping[str, str]) -> Exception:
    """What a module's ``__getattr__`` raises for ``name``, with what ``refused`` says of it.

    That is an ImportError where something is said: ``from module import name`` replaces an AttributeError by its own,
    and its reader would not learn the reason.
    """
    if name in refused:
        return ImportError(f"{module} has no {name}: {refused[name]}.", name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}")


def elsewhere(module: str, name: str, homes: Mapping[str, str], refused: Mapping[str, str]) -> object:
    """``name`` of the package that ``homes`` names for it, for ``module``'s ``__getattr__``.

    Raises:
        AttributeError, ImportError: it is none of them; see ``not_here``.
        MissingPackage: that package is not installed.
    """
    if name not in homes:
        raise not_here(module, name, refused)
    home = homes[name]
    try:
        package = import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise MissingPackage(
            f"{module}.{name} is part of {home.replace('_', '-')}, which is not installed. "
            f"Run: pip install 'fulmen[{home.removeprefix('fulmen_')}]'"
        ) from None
    value: object = getattr(package, name)
    return value
