"""``HalfPrecision``, where Lightning has it."""

from fulmen_precision import HalfPrecision

__all__ = ["HalfPrecision"]
