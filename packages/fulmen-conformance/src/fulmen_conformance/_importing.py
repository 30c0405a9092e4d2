"""Turns ``"module:callable"`` into the callable, in whatever process it is needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["import_callable"]


# Any: what the callable takes and returns is checked by the kit that uses it.
def import_callable(name: str) -> Callable[..., Any]:
    """Import what ``name`` says: ``"module:callable"`` or ``"/path/to/file.py:callable"``.

    Raises:
        ValueError: ``name`` has no colon, or names nothing that can be called.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(f'factory is {name!r}; it must look like "module:callable" or "/path/to/file.py:callable".')
    found: object = _module_of(where)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"factory is {name!r}, but {where} has no callable {attribute!r}.")
    return cast("Callable[..., Any]", found)


def _module_of(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where)
    name = f"_fulmen_conformance_{path.stem}_{abs(hash(str(path.resolve())))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{where} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
