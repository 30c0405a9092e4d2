"""LambdaCallback: hooks given as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen_protocols import HOOKS, MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LambdaCallback"]


class LambdaCallback(Callback):
    """Run functions as hooks: ``LambdaCallback(on_train_epoch_end=lambda trainer, pl_module: ...)``.

    Args:
        hooks: a function for each hook, called with the hook's arguments: ``(trainer, pl_module, ...)``.

    Raises:
        MisconfigurationException: there is no hook of that name, or it is given something that cannot be called.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in HOOKS:
                raise MisconfigurationException(
                    f"LambdaCallback got {name!r}, which is no hook.{did_you_mean(name, HOOKS)} "
                    f"Hooks are {sorted(HOOKS)!r}."
                )
            if function is None:
                continue
            if not callable(function):
                raise MisconfigurationException(f"LambdaCallback({name}={function!r}): give a function.")
            setattr(self, name, function)
