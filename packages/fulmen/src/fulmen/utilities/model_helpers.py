"""What a user's class overrides, and models made by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fulmen.callbacks.callback import Callback
from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule
from fulmen_protocols import MissingPackage

if TYPE_CHECKING:
    from torch import nn

__all__ = ["get_torchvision_model", "is_overridden"]


def is_overridden(method_name: str, instance: object = None, parent: type[object] | None = None) -> bool:
    """Whether ``instance`` has its own version of a method of ``parent``.

    Args:
        method_name: of a method that ``parent`` has.
        instance: an object; None: False.
        parent: the class to compare with. None: LightningModule, LightningDataModule or Callback, whichever fits.

    Raises:
        ValueError: no parent was given and none fits, or the parent has no such method.
    """
    if instance is None:
        return False
    if parent is None:
        known = (LightningModule, LightningDataModule, Callback)
        parent = next((kind for kind in known if isinstance(instance, kind)), None)
        if parent is None:
            names = ", ".join(kind.__name__ for kind in known)
            raise ValueError(
                f"is_overridden({method_name!r}, ...) got a {type(instance).__name__}, which is none of {names}. "
                "Give the class to compare with as parent."
            )
    own: Any = getattr(instance, method_name, None)
    if own is None:
        return False
    base: Any = getattr(parent, method_name, None)
    if base is None:
        raise ValueError(
            f"is_overridden({method_name!r}, ...): {parent.__name__} has no such method, so nothing can override it."
        )
    return _code(own) is not _code(base)


def _code(method: Any) -> object:
    """The code that runs, behind decorators that keep ``__wrapped__``, partial functions and bound methods."""
    while True:
        if isinstance(method, partial):
            method = cast("Any", method).func
        elif hasattr(method, "__wrapped__"):
            method = method.__wrapped__
        else:
            break
    method = getattr(method, "__func__", method)
    return getattr(method, "__code__", method)


def get_torchvision_model(model_name: str, **kwargs: Any) -> nn.Module:
    """``torchvision.models.get_model``.

    Raises:
        MissingPackage: torchvision is not installed.
    """
    try:
        from torchvision import models  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"get_torchvision_model({model_name!r}) needs torchvision, which is not installed: pip install torchvision"
        ) from error
    return cast("Any", models).get_model(model_name, **kwargs)  # type: ignore[no-any-return]  # Any by its nature
