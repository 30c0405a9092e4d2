"""``DoublePrecision``, where Lightning has it."""

from fulmen_precision import DoublePrecision

__all__ = ["DoublePrecision"]
