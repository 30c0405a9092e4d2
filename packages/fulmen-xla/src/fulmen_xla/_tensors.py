"""Casting the floating-point tensors of nested collections."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, cast

from torch import Tensor

if TYPE_CHECKING:
    import torch

__all__ = ["cast_floating"]


def cast_floating(data: object, dtype: torch.dtype) -> object:
    """Return ``data`` with every real floating-point tensor in ``dtype``.

    Lists, tuples, named tuples, mappings and dataclass instances are entered, to any depth. What holds no tensor to
    cast is returned as the same object, and nothing of the caller's is changed in place.
    """
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, (list, tuple)):
        return _cast_sequence(cast("list[object] | tuple[object, ...]", data), dtype)
    if isinstance(data, Mapping):
        return _cast_mapping(cast("Mapping[object, object]", data), dtype)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _cast_dataclass(data, dtype)
    return data


def _cast_sequence(data: list[object] | tuple[object, ...], dtype: torch.dtype) -> object:
    items = [cast_floating(item, dtype) for item in data]
    if all(new is old for new, old in zip(items, data, strict=True)):
        return data
    kind = type(data)
    if kind is list:
        return items
    if hasattr(data, "_fields"):  # a named tuple takes its fields one by one
        return cast("type[object]", kind)(*items)
    return kind(items)


def _cast_mapping(data: Mapping[object, object], dtype: torch.dtype) -> object:
    changed: dict[object, object] = {}
    for key, value in data.items():
        new = cast_floating(value, dtype)
        if new is not value:
            changed[key] = new
    if not changed:
        return data
    if isinstance(data, MutableMapping):  # a copy keeps the attributes and the order of a subclass
        result = copy.copy(data)
        result.update(changed)
        return result
    return {**data, **changed}


def _cast_dataclass(data: object, dtype: torch.dtype) -> object:
    changed: dict[str, object] = {}
    for field in dataclasses.fields(data):  # type: ignore[arg-type]
        value = getattr(data, field.name, None)
        new = cast_floating(value, dtype)
        if new is not value:
            changed[field.name] = new
    if not changed:
        return data
    # A plain copy, not dataclasses.replace: that one cannot set fields with init=False.
    result = copy.copy(data)
    for name, value in changed.items():
        object.__setattr__(result, name, value)  # frozen instances too
    return result
