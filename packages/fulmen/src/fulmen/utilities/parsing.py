"""Hyperparameters and other objects: what can be stored, and where an attribute is held."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from fulmen.hparams import AttributeDict, arguments_of_frame
from fulmen.tuner import _attributes

if TYPE_CHECKING:
    from types import FrameType

    from fulmen.module import LightningModule

__all__ = [
    "AttributeDict",
    "get_init_args",
    "is_picklable",
    "lightning_getattr",
    "lightning_hasattr",
    "lightning_setattr",
]


def get_init_args(frame: FrameType) -> dict[str, Any]:
    """What the constructor that runs in ``frame`` was given, without ``self``; keyword arguments are among the others.

    Empty where ``frame`` is no constructor of a class that says ``super()`` or ``__class__``.
    """
    return arguments_of_frame(frame)


def is_picklable(obj: object) -> bool:
    """Whether ``pickle`` can store ``obj``. It is tried, so large objects take their time."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def lightning_hasattr(model: LightningModule, attribute: str) -> bool:
    """Whether ``model``, its datamodule or the hyperparameters of either have ``attribute``."""
    try:
        _found(model, attribute)
    except AttributeError:
        return False
    return True


def lightning_getattr(model: LightningModule, attribute: str) -> Any:
    """Its value; that of the datamodule where several have it, and of hyperparameters before attributes.

    Raises:
        AttributeError: nobody has it.
    """
    return _found(model, attribute).value


def lightning_setattr(model: LightningModule, attribute: str, value: object) -> None:
    """Set it wherever it is held.

    Raises:
        AttributeError: nobody has it.
    """
    _found(model, attribute).set(value)


def _found(model: LightningModule, attribute: str) -> _attributes.Attribute:
    trainer = model._trainer  # pyright: ignore[reportPrivateUsage]
    return _attributes.find([attribute], model, None if trainer is None else trainer.datamodule, flag="attribute")
