"""``Accelerator``, where Lightning has it."""

from fulmen_protocols import Accelerator

__all__ = ["Accelerator"]
