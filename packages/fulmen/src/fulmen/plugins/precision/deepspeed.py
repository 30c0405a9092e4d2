"""``DeepSpeedPrecision``, where Lightning has it."""

from fulmen.plugins import DeepSpeedPrecision

__all__ = ["DeepSpeedPrecision"]
