"""Nested collections, as the seams mean them: what of a batch or a state is entered, and what comes back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import DataclassInstance

__all__ = ["map_instances"]

T = TypeVar("T")


def map_instances(kind: type[T], function: Callable[[T], object], data: object) -> object:
    """``data`` with ``function(value)`` in the place of every instance of ``kind``, at any depth.

    Lists, tuples, named tuples, mappings and dataclass instances are entered, and keep their type; what else is no
    instance of ``kind`` is left alone. Nothing of the caller's is changed in place: a collection in which something
    changes is copied, any other is returned as the same object.

    Args:
        kind: ``torch.Tensor``, for example. An instance is never entered, not even one that is a collection itself.
        function: gets each instance, in the order in which they stand.
        data: any object.
    """
    if isinstance(data, kind):
        return function(data)
    if isinstance(data, (list, tuple)):
        return _in_sequence(kind, function, cast("list[object] | tuple[object, ...]", data))
    if isinstance(data, Mapping):
        return _in_mapping(kind, function, cast("Mapping[object, object]", data))
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _in_dataclass(kind, function, data)
    return data


def _in_sequence(kind: type[T], function: Callable[[T], object], data: list[object] | tuple[object, ...]) -> object:
    items = [map_instances(kind, function, item) for item in data]
    if all(new is old for new, old in zip(items, data, strict=True)):
        return data
    rebuild = cast("Callable[..., object]", type(data))
    # A named tuple takes its fields one by one.
    return rebuild(*items) if hasattr(data, "_fields") else rebuild(items)


def _in_mapping(kind: type[T], function: Callable[[T], object], data: Mapping[object, object]) -> object:
    changed: dict[object, object] = {}
    for key, value in data.items():
        new = map_instances(kind, function, value)
        if new is not value:
            changed[key] = new
    if not changed:
        return data
    if isinstance(data, MutableMapping):  # a copy keeps the attributes and the order of a subclass
        result = copy.copy(data)
        result.update(changed)
        return result
    return {**data, **changed}


def _in_dataclass(kind: type[T], function: Callable[[T], object], data: DataclassInstance) -> object:
    changed: dict[str, object] = {}
    for field in dataclasses.fields(data):
        value: object = getattr(data, field.name, None)  # a field may have no value yet
        new = map_instances(kind, function, value)
        if new is not value:
            changed[field.name] = new
    if not changed:
        return data
    # A plain copy, not dataclasses.replace: that one cannot set fields with init=False.
    result = copy.copy(data)
    for name, value in changed.items():
        object.__setattr__(result, name, value)  # frozen instances too
    return result
