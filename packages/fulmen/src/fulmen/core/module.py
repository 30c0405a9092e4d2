"""``LightningModule``, where Lightning has it."""

from fulmen.module import LightningModule

__all__ = ["LightningModule"]
