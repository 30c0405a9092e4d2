"""Moving batches to a device, and walking nested collections."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["convert_tensors_to_scalars", "map_leaves", "move_data_to_device", "mover"]

T = TypeVar("T")


@runtime_checkable
class _Movable(Protocol):
    def to(self, device: torch.device) -> object: ...


def _never(_: object) -> bool:
    return False


def map_leaves(
    function: Callable[[object], object], data: object, is_leaf: Callable[[object], bool] = _never
) -> object:
    """Apply ``function`` to every leaf of nested mappings, sequences, named tuples and dataclass instances.

    Containers keep their type. One whose leaves all come back as they were is returned itself, not copied.

    Args:
        function: gets each leaf and returns what takes its place.
        data: any object; what is no container is a leaf.
        is_leaf: containers for which it is True are leaves, too.
    """
    if isinstance(data, (Tensor, str, bytes)) or is_leaf(data):
        return function(data)
    if isinstance(data, Mapping):
        entries = cast("Mapping[object, object]", data)
        changed = {key: map_leaves(function, value, is_leaf) for key, value in entries.items()}
        if all(changed[key] is value for key, value in entries.items()):
            return entries
        return _rebuilt_mapping(entries, changed)
    if isinstance(data, Sequence):
        items = cast("Sequence[object]", data)
        new = [map_leaves(function, item, is_leaf) for item in items]
        if all(a is b for a, b in zip(new, items, strict=True)):
            return items
        kind = cast("Callable[..., object]", type(items))
        return kind(*new) if isinstance(items, tuple) and hasattr(items, "_fields") else kind(new)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _rebuilt_dataclass(function, data, is_leaf)
    return function(data)


def _rebuilt_mapping(old: Mapping[object, object], new: dict[object, object]) -> object:
    if type(old) is dict:
        return new
    if isinstance(old, defaultdict):
        return defaultdict(old.default_factory, new)
    return cast("Callable[..., object]", type(old))(new)


def _rebuilt_dataclass(function: Callable[[object], object], data: object, is_leaf: Callable[[object], bool]) -> object:
    result = data
    for one in dataclasses.fields(cast("type", data)):
        if not hasattr(data, one.name):
            continue  # a field without a value yet
        value: object = getattr(data, one.name)
        moved = map_leaves(function, value, is_leaf)
        if moved is not value:
            if result is data:
                result = copy(data)
            # object's own: a frozen dataclass refuses plain assignment even on our fresh copy.
            object.__setattr__(result, one.name, moved)
    return result


def _has_to(data: object) -> bool:
    return isinstance(data, _Movable) and not isinstance(data, type)


def move_data_to_device(batch: T, device: torch.device | str) -> T:
    """Move every tensor, and everything else that has a ``to`` method, in nested collections to ``device``.

    Copies to a device other than CPU and MPS do not wait for the host (``non_blocking``); they overlap where the source
    is pinned. An object whose ``to`` returns None is taken to have moved itself. What is there already is not copied.
    """
    return cast("T", mover(torch.device(device))(batch))


def mover(device: torch.device) -> Callable[[object], object]:
    """``move_data_to_device`` for one device, prepared once.

    Tensors and lists or tuples of tensors take a short path, which on CPU costs well under a microsecond.
    """
    if device.type == "cpu":
        return _to_cpu
    non_blocking = device.type != "mps"  # MPS returns garbage for some non-blocking copies (pytorch#83015)

    def move_leaf(data: object) -> object:
        if isinstance(data, Tensor):
            return data.to(device, non_blocking=non_blocking)
        return _move_object(data, device)

    def move(batch: object) -> object:
        kind = type(batch)
        if kind is Tensor:
            return cast("Tensor", batch).to(device, non_blocking=non_blocking)
        if kind is list or kind is tuple:
            items = cast("Sequence[object]", batch)
            if all(type(item) is Tensor for item in items):
                moved = [cast("Tensor", item).to(device, non_blocking=non_blocking) for item in items]
                return moved if kind is list else tuple(moved)
        return map_leaves(move_leaf, batch, _has_to)

    return move


_CPU = torch.device("cpu")


def _leaf_to_cpu(data: object) -> object:
    return data.to(_CPU) if isinstance(data, Tensor) else _move_object(data, _CPU)


def _to_cpu(batch: object) -> object:
    kind = type(batch)
    if kind is Tensor:
        tensor = cast("Tensor", batch)
        return tensor if tensor.is_cpu else tensor.to(_CPU)
    if kind is list or kind is tuple:
        for item in cast("Sequence[object]", batch):
            if type(item) is not Tensor or not item.is_cpu:
                break
        else:
            return batch
    return map_leaves(_leaf_to_cpu, batch, _has_to)


def _move_object(data: object, device: torch.device) -> object:
    if isinstance(data, _Movable) and not isinstance(data, type):
        moved = data.to(device)
        return data if moved is None else moved
    return data


def convert_tensors_to_scalars(data: T) -> T:
    """Replace every tensor in nested collections by its Python number. Waits for the device once per tensor there.

    Raises:
        ValueError: a tensor has more or less than one element.
    """
    return cast("T", map_leaves(_scalar, data))


def _scalar(data: object) -> object:
    if not isinstance(data, Tensor):
        return data
    if data.numel() != 1:
        raise ValueError(
            f"a tensor of shape {tuple(data.shape)} is no scalar. Reduce it to one element, with .mean() for example."
        )
    return data.item()
