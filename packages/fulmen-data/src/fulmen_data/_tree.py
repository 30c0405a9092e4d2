"""Nested collections of loaders."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, cast

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["leaves", "map_leaves"]

_VALUES = (int, float, complex, str, bytes, Tensor, type(None))


def leaves(tree: object) -> list[object]:
    """The loaders in ``tree``, depth first.

    A collection of plain values (``[1, 2, 3]``) is itself a loader, and so is an empty one within another.
    """
    found: list[object] = []
    map_leaves(found.append, tree)
    return found


def map_leaves(function: Callable[[object], object], tree: object) -> object:
    """The same collection with ``function(leaf)`` in place of each leaf; called in the order of ``leaves``."""
    children = _children(tree)
    if children is None:
        return function(tree)
    new = [function(child) if _children(child) == [] else map_leaves(function, child) for child in children]
    kind = cast("Callable[..., object]", type(tree))
    if isinstance(tree, dict):
        result = dict(zip(cast("dict[object, object]", tree), new, strict=True))
        # An OrderedDict stays one; a defaultdict would need its factory, which an output has no use for.
        return result if isinstance(tree, defaultdict) else kind(result)
    return kind(*new) if hasattr(tree, "_fields") else kind(new)


def _children(tree: object) -> list[object] | None:
    """What ``tree`` holds; None where it is a leaf."""
    if isinstance(tree, dict):
        children = list(cast("dict[object, object]", tree).values())
    elif isinstance(tree, (list, tuple)):
        children = list(cast("Iterable[object]", tree))
    else:
        return None
    return None if children and all(isinstance(child, _VALUES) for child in children) else children
