"""Fabric's callbacks: where they come from, and how their methods are called."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import CALLBACKS, BrokenPlugin, MissingPackage, available, load_factory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

__all__ = ["adopt", "call_each", "give_optimizers", "installed_callbacks"]


def installed_callbacks() -> list[object]:
    """What the factories of entry-point group ``fulmen.callbacks.v1`` return: each a callback, or a list of them.

    A factory that cannot be imported is reported and left out: nobody asked for it by name.
    """
    found: list[object] = []
    for name in available(CALLBACKS):
        try:
            factory = load_factory(CALLBACKS, name)
        except (BrokenPlugin, MissingPackage) as error:
            rank_zero_warn(f"{error} It is left out.")
            continue
        if not callable(factory):
            rank_zero_warn(f"callback {name!r} is registered as {factory!r}, which cannot be called. It is left out.")
            continue
        made: object = factory()
        found.extend(cast("list[object]", made) if isinstance(made, (list, tuple)) else [made])
    return found


def call_each(callbacks: Sequence[object], name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Call the method ``name`` of each callback that has it, with those keyword arguments that it takes."""
    for callback in callbacks:
        method = getattr(callback, name, None)
        if method is None:
            continue
        if not callable(method):
            rank_zero_warn(f"{type(callback).__name__}.{name} is not a method; fabric.call() skips it.")
            continue
        method(*args, **_accepted(method, dict(kwargs)))


def adopt(fabric: object, module: nn.Module, optimizers: Sequence[Optimizer]) -> bool:
    """Tell a module that has a property ``fabric``, as a LightningModule has, whose loop runs it.

    Returns:
        Whether it has one; its hooks can then be called by name, as a callback's.
    """
    if not _knows_fabric(module):
        return False
    knowing = cast("Any", module)
    knowing.fabric = fabric
    knowing._fabric_optimizers = list(optimizers)  # what LightningModule.optimizers() returns under Fabric
    return True


def give_optimizers(module: nn.Module | None, optimizers: Sequence[Optimizer]) -> None:
    """Tell an adopted module of optimizers that were made after it."""
    if module is not None and _knows_fabric(module):
        cast("Any", module)._fabric_optimizers.extend(optimizers)


def _knows_fabric(module: nn.Module) -> bool:
    return isinstance(inspect.getattr_static(type(module), "fabric", None), property)


def _accepted(method: Callable[..., object], kwargs: dict[str, object]) -> dict[str, object]:
    if not kwargs:
        return kwargs
    try:
        parameters = inspect.signature(method).parameters.values()
    except ValueError:
        return kwargs
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return kwargs
    names = {one.name for one in parameters if one.kind is not one.POSITIONAL_ONLY}
    return {name: value for name, value in kwargs.items() if name in names}
