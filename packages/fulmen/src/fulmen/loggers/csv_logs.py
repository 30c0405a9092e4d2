"""``CSVLogger``, where Lightning has it."""

from fulmen_loggers import CSVLogger

__all__ = ["CSVLogger"]
