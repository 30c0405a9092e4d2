"""``ModelParallelStrategy``, where Lightning has it."""

from fulmen_strategies import ModelParallelStrategy

__all__ = ["ModelParallelStrategy"]
