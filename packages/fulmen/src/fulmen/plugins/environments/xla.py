"""``XLAEnvironment``, where Lightning has it."""

from fulmen.plugins import XLAEnvironment

__all__ = ["XLAEnvironment"]
