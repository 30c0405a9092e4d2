"""Lightning's path for one thing that programs ask for without a Trainer: which devices it would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return submodule("fulmen.trainer.connectors", name)
