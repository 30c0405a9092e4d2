"""Exceptions that people catch, by the names they look for here; they live where they are raised."""

from __future__ import annotations

from fulmen.exceptions import MisconfigurationException, SIGTERMException

__all__ = ["MisconfigurationException", "SIGTERMException"]

# Named by few, so imported only by those.
_HOME = {"TrainingSpikeException": "fulmen_fabric.spike", "_TunerExitException": "fulmen.exceptions"}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value: object = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fulmen.utilities.exceptions' has no attribute {name!r}")
