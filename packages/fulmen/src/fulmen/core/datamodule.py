"""``LightningDataModule``, where Lightning has it."""

from fulmen.datamodule import LightningDataModule

__all__ = ["LightningDataModule"]
