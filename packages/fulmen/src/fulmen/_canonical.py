"""Names of weights that do not depend on what is compiled: without the ``_orig_mod.`` of ``torch.compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["as_named_here", "canonical"]

_WRAPPER = "_orig_mod."


def canonical(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """``state`` under the names that the weights have when nothing is compiled."""
    if not any(_WRAPPER in name for name in state):
        return state
    return {name.replace(_WRAPPER, ""): value for name, value in state.items()}


def as_named_here(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """``state`` under the names that ``module`` has for its weights now, whatever was compiled when it was saved."""
    compiled = {name.replace(_WRAPPER, ""): name for name in module.state_dict() if _WRAPPER in name}
    plain = canonical(state)
    return {compiled.get(name, name): value for name, value in plain.items()} if compiled else plain
