"""``XLAStrategy``, where Lightning has it."""

from fulmen.strategies import XLAStrategy

__all__ = ["XLAStrategy"]
