"""``AsyncCheckpointIO``, where Lightning has it."""

from fulmen_checkpoint import AsyncCheckpointIO

__all__ = ["AsyncCheckpointIO"]
