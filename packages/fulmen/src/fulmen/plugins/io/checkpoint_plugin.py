"""``CheckpointIO``, where Lightning has it."""

from fulmen_protocols import CheckpointIO

__all__ = ["CheckpointIO"]
