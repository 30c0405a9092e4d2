"""``XLAFSDPStrategy``, where Lightning has it."""

from fulmen.strategies import XLAFSDPStrategy

__all__ = ["XLAFSDPStrategy"]
