"""Importing a service's own library, when the first logger of its kind is made."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from fulmen_protocols.errors import MissingPackage

__all__ = ["need", "require"]


def require(logger: str, module: str, extra: str) -> None:
    """See that ``module`` is installed, without importing it.

    Raises:
        MissingPackage: it is not.
    """
    if find_spec(module) is None:
        raise MissingPackage(
            f"{logger} needs {module}, which is not installed. Run: pip install 'fulmen-loggers[{extra}]'"
        )


def need(logger: str, module: str, extra: str) -> object:
    """Import ``module``.

    Raises:
        MissingPackage: it is not installed.
    """
    require(logger, module.partition(".")[0], extra)
    return import_module(module)
