"""From the user's objects to what a checkpoint holds, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.optim import Optimizer

from fulmen_fabric.compiled import as_named_here, canonical, uncompiled
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError, Stateful

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["load_into", "load_raw_into", "to_saved"]


def to_saved(state: Mapping[str, object], filters: Mapping[str, Callable[[str, Any], bool]]) -> dict[str, object]:
    """``state`` with every module, optimizer and stateful object replaced by its state.

    Raises:
        MisconfigurationException: a filter has no entry; a ``TypeError`` too where it is not callable, its entry has no
            named parts, or ``state`` is no mapping.
    """
    if not isinstance(cast("object", state), Mapping):
        raise MisconfigurationTypeError(
            f"save got a {type(state).__name__} as state. Pass a dict of names and what they hold, such as "
            "{'model': model, 'optimizer': optimizer, 'step': step}."
        )
    unknown = sorted(filters.keys() - state.keys())
    if unknown:
        raise MisconfigurationException(
            f"save got filters for {', '.join(map(repr, unknown))}, which the state has not. It has: "
            f"{', '.join(map(repr, state))}."
        )
    saved: dict[str, object] = {}
    for name, value in state.items():
        entry: object = _state_of(uncompiled(value))
        if name in filters:
            keep = filters[name]
            if not callable(cast("object", keep)) or not isinstance(entry, Mapping):
                raise MisconfigurationTypeError(
                    f"save got the filter {keep!r} for {name!r}, a {type(value).__name__}. A filter is a function of "
                    "(key, value), for an entry with a state_dict or a mapping."
                )
            parts = cast("Mapping[str, object]", entry)
            entry = {key: part for key, part in parts.items() if keep(key, part)}
        saved[name] = entry
    return saved


def load_into(state: dict[str, Any], checkpoint: Mapping[str, object], strict: bool, path: str) -> dict[str, Any]:
    """Restore the entries of ``state`` from ``checkpoint`` and return what it holds besides.

    Raises:
        KeyError: strict, and a name of ``state`` is not in the checkpoint; nothing has been changed then.
    """
    missing = [name for name in state if name not in checkpoint]
    if missing and strict:
        raise KeyError(
            f"{path} holds {', '.join(map(repr, checkpoint))}, but not {', '.join(map(repr, missing))}. "
            "Leave them out of the state, or pass strict=False."
        )
    for name, value in list(state.items()):
        if name not in checkpoint:
            continue
        if isinstance(value, Stateful):
            _load_object(uncompiled(value), cast("dict[str, Any]", checkpoint[name]), strict)
        else:
            state[name] = checkpoint[name]
    return {name: value for name, value in checkpoint.items() if name not in state}


def load_raw_into(obj: object, checkpoint: dict[str, object], strict: bool) -> None:
    """Load a bare state dict into a module or optimizer."""
    if not isinstance(obj, (nn.Module, Optimizer)):
        raise MisconfigurationException(
            f"load_raw got {type(obj).__name__}. Pass a module or an optimizer; use load() for anything else."
        )
    _load_object(cast("Stateful", uncompiled(obj)), cast("dict[str, Any]", checkpoint), strict)


def _state_of(value: object) -> object:
    if isinstance(value, nn.Module):
        return canonical(value.state_dict())  # whatever part of it is compiled
    return value.state_dict() if isinstance(value, Stateful) else value


def _load_object(obj: Stateful, state: dict[str, Any], strict: bool) -> None:
    if not isinstance(obj, nn.Module):
        obj.load_state_dict(state)
        return
    result = obj.load_state_dict(as_named_here(state, obj), strict=strict)
    left = [*getattr(result, "missing_keys", ()), *getattr(result, "unexpected_keys", ())]
    if left:
        rank_zero_warn(f"{type(obj).__name__} and the checkpoint differ in {', '.join(map(repr, left))}.")
