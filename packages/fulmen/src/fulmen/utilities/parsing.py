"""Hyperparameters and other objects: what can be stored."""

from __future__ import annotations

import pickle

from fulmen.hparams import AttributeDict

__all__ = ["AttributeDict", "is_picklable"]


def is_picklable(obj: object) -> bool:
    """Whether ``pickle`` can store ``obj``. It is tried, so large objects take their time."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True
