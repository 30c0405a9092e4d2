"""``XLAAccelerator``, where Lightning has it."""

from fulmen.accelerators import XLAAccelerator

__all__ = ["XLAAccelerator"]
