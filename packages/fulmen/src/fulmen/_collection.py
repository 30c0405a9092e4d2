"""Nested collections: apply a function to every leaf, keeping the containers' own types."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["map_leaves", "move_to_device"]


def map_leaves(
    function: Callable[[Any], Any], data: Any, *, is_leaf: Callable[[Any], bool] = lambda value: False
) -> Any:
    """A copy of ``data`` with ``function`` applied to everything that is not a container.

    Containers are mappings, lists, tuples (named ones too) and dataclass instances; subclasses keep their type.
    ``is_leaf`` says which containers to hand to ``function`` whole.
    """
    if isinstance(data, Tensor) or is_leaf(data):
        return function(data)
    kind: Any = cast("object", data).__class__
    if isinstance(data, Mapping):
        items = cast("Mapping[object, Any]", data)
        new = {key: map_leaves(function, value, is_leaf=is_leaf) for key, value in items.items()}
        if kind is dict:
            return new
        return kind(items.default_factory, new) if isinstance(items, defaultdict) else kind(new)
    if isinstance(data, (list, tuple)):
        values = cast("Sequence[Any]", data)
        mapped = [map_leaves(function, value, is_leaf=is_leaf) for value in values]
        return kind(*mapped) if hasattr(kind, "_fields") else kind(mapped)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        result = copy(data)
        for field in dataclasses.fields(data):
            # Past __setattr__, which a frozen dataclass refuses; the copy is ours alone.
            object.__setattr__(result, field.name, map_leaves(function, getattr(data, field.name), is_leaf=is_leaf))
        return result
    return function(data)


def move_to_device(data: Any, device: torch.device) -> Any:
    """``data`` with every tensor, and every object that has a ``to`` method, on ``device``.

    Copies to CUDA are asynchronous; they overlap with other work only when the source is pinned.
    """
    return map_leaves(lambda leaf: _move(leaf, device), data, is_leaf=_moves_itself)


def _moves_itself(value: object) -> bool:
    return callable(getattr(value, "to", None)) and not isinstance(value, type)


def _move(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(device, non_blocking=device.type == "cuda")
    if not _moves_itself(leaf):
        return leaf
    moved = leaf.to(device)
    return leaf if moved is None else moved  # a ``to`` that works in place may return nothing
