"""``CPUAccelerator``, where Lightning has it."""

from fulmen_accelerators import CPUAccelerator

__all__ = ["CPUAccelerator"]
