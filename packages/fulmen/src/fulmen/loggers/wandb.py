"""``WandbLogger``, where Lightning has it."""

from fulmen_loggers import WandbLogger

__all__ = ["WandbLogger"]
