"""``DataParallelStrategy``, where Lightning has it."""

from fulmen_strategies import DataParallelStrategy

__all__ = ["DataParallelStrategy"]
