"""Which objects ``torch.load(weights_only=True)`` gives back, found by type and without pickling anything."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["find_unsafe"]

_LEAVES: frozenset[type] = frozenset(
    {type(None), bool, float, complex, str, bytearray, torch.Size, torch.device, torch.dtype}
    | {torch.layout, torch.qscheme, torch.UntypedStorage}
)
_MAPPINGS: frozenset[type] = frozenset({dict, OrderedDict, Counter})
_SEQUENCES: frozenset[type] = frozenset({list, tuple, set})
_TENSORS: frozenset[type] = frozenset({Tensor, nn.Parameter})
# torch's restricted reader knows no longer integers (pickle's LONG4).
_GREATEST_INT = 1 << 2000


def find_unsafe(checkpoint: Mapping[str, object]) -> list[tuple[str, object]]:
    """The objects in ``checkpoint`` that could be rebuilt only by running code, each with its place.

    A place reads like ``callbacks.EarlyStopping.state[0]``. Classes registered with
    ``torch.serialization.add_safe_globals`` are safe.
    """
    return list(_walk(checkpoint, "", set(), _registered()))


def _registered() -> frozenset[type]:
    safe: set[type] = set()
    # Functions are registered too, and (class, name) pairs.
    for item in cast("list[object]", torch.serialization.get_safe_globals()):
        first = cast("tuple[object, ...]", item)[0] if isinstance(item, tuple) else item
        if isinstance(first, type):
            safe.add(first)
    return frozenset(safe)


def _walk(value: object, place: str, seen: set[int], safe: frozenset[type]) -> Iterator[tuple[str, object]]:
    kind = type(value)
    if kind in _LEAVES or id(value) in seen:  # shared and cyclic containers
        return
    if kind is int:
        if not -_GREATEST_INT < cast("int", value) < _GREATEST_INT:
            yield place, value
    elif kind is bytes:
        if not value:  # pickled as a call of bytes(), which torch's restricted reader refuses
            yield place, value
    elif kind in _TENSORS:
        # Attributes set on a tensor are stored with it.
        if value.__dict__:
            seen.add(id(value))
            yield from _walk(value.__dict__, place, seen, safe)
    elif kind in _MAPPINGS:
        seen.add(id(value))
        for key, item in cast("Mapping[object, object]", value).items():
            if type(key) not in _LEAVES:
                yield from _walk(key, f"{_join(place, key)} (a key)", seen, safe)
            if type(item) not in _LEAVES:
                yield from _walk(item, _join(place, key), seen, safe)
    elif kind in _SEQUENCES:
        seen.add(id(value))
        items = cast("list[object]", value)
        if not _is_flat(items):
            for index, item in enumerate(items):
                if type(item) not in _LEAVES:
                    yield from _walk(item, f"{place}[{index}]", seen, safe)
    elif kind not in safe:
        yield place or "the checkpoint itself", value


def _is_flat(items: list[object]) -> bool:
    """Whether a sequence holds only leaves; a sampler's order may have millions."""
    kinds = set(map(type, items))
    if kinds == {int}:
        numbers = cast("list[int]", items)
        return min(numbers) > -_GREATEST_INT and max(numbers) < _GREATEST_INT
    return kinds <= _LEAVES


def _join(place: str, key: object) -> str:
    if type(key) is str:
        return f"{place}.{key}" if place else key
    return f"{place}[{key!r}]"
