"""``DDPStrategy``, where Lightning has it."""

from fulmen_strategies import DDPStrategy

__all__ = ["DDPStrategy"]
