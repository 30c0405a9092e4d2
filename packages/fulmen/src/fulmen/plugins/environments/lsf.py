"""``LSFEnvironment``, where Lightning has it."""

from fulmen_strategies import LSFEnvironment

__all__ = ["LSFEnvironment"]
