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

_KINDS: dict[str, type[MonitoredValue | SharedClock]] = {
    "MonitoredValue": MonitoredValue,
    "SharedClock": SharedClock,
}
_PARTS = "_parts"
_LENT = frozenset({"log", "log_dict"})


def plain_state(callback: object) -> dict[str, Any]:
    """What ``__getstate__`` returns: the attributes, with those of our parts in place of the parts.

    Without ``log`` and ``log_dict``, the module's methods that a run lends to its callbacks, and the module with them.
    """
    state: dict[str, Any] = {name: value for name, value in vars(callback).items() if name not in _LENT}
    parts: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, value in list(state.items()):
        if isinstance(value, MonitoredValue | SharedClock):
            parts[name] = (type(value).__name__, dict(vars(value)))
            del state[name]
    return {**state, _PARTS: parts}


def restore(callback: object, state: Mapping[str, Any]) -> None:
    """What ``__setstate__`` does with it."""
    attributes = dict(state)
    for name, (kind, values) in attributes.pop(_PARTS, {}).items():
        part = object.__new__(_KINDS[kind])
        vars(part).update(values)
        attributes[name] = part
    vars(callback).update(attributes)
