"""``Precision``, where Lightning has it."""

from fulmen_protocols import Precision

__all__ = ["Precision"]
