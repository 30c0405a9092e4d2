"""``FSDPStrategy``, where Lightning has it."""

from fulmen_strategies import FSDPStrategy

__all__ = ["FSDPStrategy"]
