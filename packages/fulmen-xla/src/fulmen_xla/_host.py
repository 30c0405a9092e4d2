"""Walking nested collections, and bringing tensors from XLA devices to the host, all in one transfer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from fulmen_xla._library import library

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["map_tensors", "tensors_of", "to_host"]


def to_host(tree: Mapping[str, object]) -> dict[str, object]:
    """A copy of ``tree`` with every XLA tensor on the CPU; other leaves are taken as they are.

    What is recorded is run first, once, instead of once for each tensor that is read.
    """
    found = [tensor.detach() for tensor in tensors_of(tree) if tensor.device.type == "xla"]
    if not found:
        return dict(tree)
    library().sync()
    answers = iter(cast("list[Tensor]", library()._XLAC._xla_get_cpu_tensors(found)))
    moved = map_tensors(lambda tensor: next(answers) if tensor.device.type == "xla" else tensor, tree)
    return dict(cast("Mapping[str, object]", moved))


def tensors_of(tree: object) -> list[Tensor]:
    """Every tensor in nested mappings, lists, tuples and dataclass instances, in the order of ``map_tensors``."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found


def map_tensors(function: Callable[[Tensor], object], tree: object) -> object:
    """Rebuild nested collections with ``function`` of every tensor; containers keep their type."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        entries = cast("Mapping[object, object]", tree)
        changed = {key: map_tensors(function, value) for key, value in entries.items()}
        if type(entries) is dict:
            return changed
        result: Any = copy.copy(entries)
        try:
            result.update(changed)
        except AttributeError:  # an immutable mapping
            return changed
        return cast("object", result)
    if isinstance(tree, (list, tuple)):
        whole = cast("Any", tree)
        items = [map_tensors(function, value) for value in whole]
        kind = cast("Callable[..., object]", type(whole))
        return kind(*items) if hasattr(whole, "_fields") else kind(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _map_dataclass(function, cast("Any", tree))
    return tree


def _map_dataclass(function: Callable[[Tensor], object], instance: object) -> object:
    result = copy.copy(instance)
    for field in dataclasses.fields(cast("type", instance)):
        if hasattr(instance, field.name):
            # object's own: a frozen dataclass refuses plain assignment even on a fresh copy.
            object.__setattr__(result, field.name, map_tensors(function, getattr(instance, field.name)))
    return result
