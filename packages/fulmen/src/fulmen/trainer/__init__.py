"""The Trainer, and the states that it goes through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen.trainer.trainer import Trainer as Trainer
    from fulmen_fabric import seed_everything as seed_everything

_HOME = {"Trainer": "fulmen.trainer.trainer", "seed_everything": "fulmen_fabric"}

__all__ = ["Trainer", "seed_everything"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here
    # When it is named: the command line reads the source of fulmen.trainer.trainer without importing torch.
    def __getattr__(name: str) -> object:
        if name not in _HOME:
            return submodule("fulmen.trainer", name)
        from importlib import import_module

        value: object = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
