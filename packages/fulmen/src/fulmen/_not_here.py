"""Names that people look for in a module and that are not there, on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["not_here"]


def not_here(module: str, name: str, refused: Mapping[str, str]) -> Exception:
    """What a module's ``__getattr__`` raises for ``name``, with what ``refused`` says of it.

    That is an ImportError where something is said: ``from module import name`` replaces an AttributeError by its own,
    and its reader would not learn the reason.
    """
    if name in refused:
        return ImportError(f"{module} has no {name}: {refused[name]}.", name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}")
