"""``TorchCheckpointIO``, where Lightning has it."""

from fulmen_checkpoint import TorchCheckpointIO

__all__ = ["TorchCheckpointIO"]
