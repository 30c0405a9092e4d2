"""``SingleDeviceXLAStrategy``, where Lightning has it."""

from fulmen.strategies import SingleDeviceXLAStrategy

__all__ = ["SingleDeviceXLAStrategy"]
