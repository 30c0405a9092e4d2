"""``SingleDeviceStrategy``, where Lightning has it."""

from fulmen_strategies import SingleDeviceStrategy

__all__ = ["SingleDeviceStrategy"]
