"""``MPSAccelerator``, where Lightning has it."""

from fulmen_accelerators import MPSAccelerator

__all__ = ["MPSAccelerator"]
