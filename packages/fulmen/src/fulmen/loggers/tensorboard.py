"""``TensorBoardLogger``, where Lightning has it."""

from fulmen_loggers import TensorBoardLogger

__all__ = ["TensorBoardLogger"]
