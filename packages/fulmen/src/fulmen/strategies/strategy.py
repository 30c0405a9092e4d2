"""``Strategy``, where Lightning has it."""

from fulmen_protocols import Strategy

__all__ = ["Strategy"]
