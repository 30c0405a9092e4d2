"""Importing libraries that only some formats need, and refusing options that a format does not have."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fulmen_protocols.errors import MisconfigurationException, MissingPackage, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["need", "only_options_of", "require"]


def require(module: str, what: str, install: str) -> None:
    """See that ``module`` is installed, without importing it.

    Raises:
        MissingPackage: it is not; ``what`` needs it, and ``install`` are pip's arguments that bring it.
    """
    if find_spec(module) is None:
        raise MissingPackage(f"{what} needs {module}, which is not installed. Run: pip install {install}")


def need(module: str, what: str, install: str) -> object:
    """Import ``module``.

    Raises:
        MissingPackage: it is not installed.
    """
    require(module, what, install)
    return import_module(module)


def only_options_of(
    function: Callable[..., object], options: Mapping[str, object], what: str, *, without: tuple[str, ...] = ()
) -> None:
    """See that ``function`` has a parameter for each option; ``without``: those that are not the caller's to set.

    Raises:
        MisconfigurationException: it has not.
    """
    known = [name for name in inspect.signature(function).parameters if name not in without]
    for name, value in options.items():
        if name not in known:
            raise MisconfigurationException(
                f"{what} got {name}={value!r}, which is no option of it.{did_you_mean(name, known)} "
                f"It has: {', '.join(sorted(known))}."
            )
