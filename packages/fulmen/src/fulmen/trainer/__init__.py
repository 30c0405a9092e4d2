"""The Trainer, and the states that it goes through."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen.trainer.trainer import Trainer as Trainer

__all__ = ["Trainer"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here
    # Found when it is named: the command line reads the source of fulmen.trainer.trainer without importing torch.
    def __getattr__(name: str) -> object:
        if name != "Trainer":
            raise AttributeError(f"module 'fulmen.trainer' has no attribute {name!r}")
        from fulmen.trainer.trainer import Trainer

        globals()[name] = Trainer
        return Trainer


def __dir__() -> list[str]:
    return sorted(__all__)
