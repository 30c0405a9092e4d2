"""Names of fulmen-xla that people look for in fulmen's own modules."""

from __future__ import annotations

from importlib import import_module

from fulmen_protocols import MissingPackage

__all__ = ["from_xla"]


def from_xla(module: str, name: str) -> object:
    """``name`` of fulmen_xla, for the module of that name.

    Raises:
        MissingPackage: fulmen-xla is not installed.
    """
    try:
        package = import_module("fulmen_xla")
    except ModuleNotFoundError as error:
        if error.name != "fulmen_xla":
            raise
        raise MissingPackage(
            f"{module}.{name} is part of fulmen-xla, which is not installed. Run: pip install 'fulmen[xla]'"
        ) from None
    value: object = getattr(package, name)
    return value
