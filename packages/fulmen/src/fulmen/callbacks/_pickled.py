"""Callbacks pickled as plain data: libraries save them with their models and load them with allow-lists of classes.

Such a list holds callbacks, which are public; not what ours are composed of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen.callbacks._monitor import MonitoredValue
from fulmen.callbacks._shared_clock import SharedClock

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["plain_state", "restore"]

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (MonitoredValue, SharedClock)}
_PARTS = "_parts"


def plain_state(callback: object) -> dict[str, Any]:
    """What ``__getstate__`` returns: the attributes, with those of our parts in place of the parts."""
    state = vars(callback)
    parts = {name: value for name, value in state.items() if type(value) in _KINDS.values()}
    plain = {name: (type(part).__name__, dict(vars(part))) for name, part in parts.items()}
    return {**{name: value for name, value in state.items() if name not in parts}, _PARTS: plain}


def restore(callback: object, state: Mapping[str, Any]) -> None:
    """What ``__setstate__`` does with it."""
    attributes = dict(state)
    for name, (kind, values) in attributes.pop(_PARTS, {}).items():
        part = _KINDS[kind].__new__(_KINDS[kind])
        vars(part).update(values)
        attributes[name] = part
    vars(callback).update(attributes)
