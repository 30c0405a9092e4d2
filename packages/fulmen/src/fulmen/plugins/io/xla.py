"""``XLACheckpointIO``, where Lightning has it."""

from fulmen.plugins import XLACheckpointIO

__all__ = ["XLACheckpointIO"]
