"""Exceptions that people catch, by the names they look for here; they live where they are raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen import exceptions
from fulmen.exceptions import MisconfigurationException, SIGTERMException
from fulmen_fabric import TrainingSpikeException

__all__ = ["MisconfigurationException", "SIGTERMException", "TrainingSpikeException"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name == "_TunerExitException":  # Lightning's name
            return getattr(exceptions, name)
        raise AttributeError(f"module 'fulmen.utilities.exceptions' has no attribute {name!r}")
