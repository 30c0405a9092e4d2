"""What ``torch.compile`` puts around modules, and what it does to the names of their weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["as_named_here", "canonical", "is_compiled", "uncompiled"]

T = TypeVar("T")

_WRAPPER = "_orig_mod."


def is_compiled(obj: object) -> bool:
    """Whether ``obj`` is what ``torch.compile`` makes of a module."""
    dynamo = cast("Any", sys.modules.get("torch._dynamo"))  # not there: nobody has compiled anything
    return dynamo is not None and isinstance(obj, dynamo.OptimizedModule)


def uncompiled(obj: T) -> T:
    """What ``torch.compile`` was given, if ``obj`` came out of it, or ``obj``."""
    return cast("Any", obj)._orig_mod if is_compiled(obj) else obj


def canonical(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """``state`` under the names that the weights have when nothing is compiled."""
    if not any(_WRAPPER in name for name in state):
        return state
    return {name.replace(_WRAPPER, ""): value for name, value in state.items()}


def as_named_here(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """``state`` under the names that ``module`` has for its weights now, whatever was compiled when it was saved."""
    plain = canonical(state)
    if not any(is_compiled(part) for part in module.modules()):
        return plain  # without the module's state, which several ranks may have to gather
    compiled = {name.replace(_WRAPPER, ""): name for name in module.state_dict() if _WRAPPER in name}
    return {compiled.get(name, name): value for name, value in plain.items()}
