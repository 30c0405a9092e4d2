"""What users subclass, under Lightning's paths; it lives in ``fulmen.module`` and ``fulmen.datamodule``."""

from typing import TYPE_CHECKING

from fulmen._not_here import submodule
from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule

__all__ = ["LightningDataModule", "LightningModule"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return submodule("fulmen.core", name)
