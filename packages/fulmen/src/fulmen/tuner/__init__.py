"""The tuner: finds a learning rate and the largest batch size before a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen.tuner.tuning import Tuner as Tuner

__all__ = ["Tuner"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name == "Tuner":
            from importlib import import_module  # the callbacks import this package, and Tuner imports the callbacks

            value: object = import_module("fulmen.tuner.tuning").Tuner
            globals()[name] = value
            return value
        return submodule("fulmen.tuner", name)


def __dir__() -> list[str]:
    return sorted(__all__)
