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
    {type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.device, torch.dtype}
    | {torch.layout, torch.qscheme}
)
_MAPPINGS: frozenset[type] = frozenset({dict, OrderedDict, Counter})
_SEQUENCES: frozenset[type] = frozenset({list, tuple, set})
_TENSORS: frozenset[type] = frozenset({Tensor, nn.Parameter})


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
    if kind in _LEAVES:
        return
    if id(value) in seen:  # shared and cyclic containers
        return
    if kind in _TENSORS:
        # Attributes set on a tensor are stored with it.
        if value.__dict__:
            seen.add(id(value))
            yield from _walk(value.__dict__, place, seen, safe)
    elif kind in _MAPPINGS:
        seen.add(id(value))
        for key, item in cast("Mapping[object, object]", value).items():
            inner = _join(place, key)
            if type(key) not in _LEAVES:
                yield from _walk(key, f"{inner} (a key)", seen, safe)
            if type(item) not in _LEAVES:
                yield from _walk(item, inner, seen, safe)
    elif kind in _SEQUENCES:
        seen.add(id(value))
        for index, item in enumerate(cast("list[object]", value)):
            if type(item) not in _LEAVES:
                yield from _walk(item, f"{place}[{index}]", seen, safe)
    elif kind not in safe:
        yield place or "the checkpoint itself", value


def _join(place: str, key: object) -> str:
    if type(key) is str:
        return f"{place}.{key}" if place else key
    return f"{place}[{key!r}]"
