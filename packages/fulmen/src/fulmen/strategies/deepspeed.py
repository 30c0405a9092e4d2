"""``DeepSpeedStrategy``, where Lightning has it."""

from fulmen.strategies import DeepSpeedStrategy

__all__ = ["DeepSpeedStrategy"]
