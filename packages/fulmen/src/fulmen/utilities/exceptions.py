"""Exceptions that people catch, by the names they look for here; they live where they are raised."""

from __future__ import annotations

from fulmen import exceptions
from fulmen.exceptions import MisconfigurationException, SIGTERMException
from fulmen_fabric import TrainingSpikeException

__all__ = ["MisconfigurationException", "SIGTERMException", "TrainingSpikeException"]


def __getattr__(name: str) -> object:
    if name == "_TunerExitException":  # Lightning's name
        return getattr(exceptions, name)
    raise AttributeError(f"module 'fulmen.utilities.exceptions' has no attribute {name!r}")
