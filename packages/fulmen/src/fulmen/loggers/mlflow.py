"""``MLFlowLogger``, where Lightning has it."""

from fulmen_loggers import MLFlowLogger

__all__ = ["MLFlowLogger"]
