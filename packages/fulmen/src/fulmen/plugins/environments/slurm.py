"""``SLURMEnvironment``, where Lightning has it."""

from fulmen_strategies import SLURMEnvironment

__all__ = ["SLURMEnvironment"]
