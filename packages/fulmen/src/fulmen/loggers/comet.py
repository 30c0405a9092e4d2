"""``CometLogger``, where Lightning has it."""

from fulmen_loggers import CometLogger

__all__ = ["CometLogger"]
