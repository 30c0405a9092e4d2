"""What users subclass, under Lightning's paths; it lives in ``fulmen.module`` and ``fulmen.datamodule``."""

from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule

__all__ = ["LightningDataModule", "LightningModule"]
