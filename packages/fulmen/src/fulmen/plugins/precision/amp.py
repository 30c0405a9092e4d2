"""``MixedPrecision``, where Lightning has it."""

from fulmen_precision import MixedPrecision

__all__ = ["MixedPrecision"]
