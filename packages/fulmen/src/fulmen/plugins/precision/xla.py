"""``XLAPrecision``, where Lightning has it."""

from fulmen.plugins import XLAPrecision

__all__ = ["XLAPrecision"]
