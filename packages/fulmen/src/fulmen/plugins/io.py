"""How checkpoints are written, where Lightning has it."""

from fulmen_checkpoint import AsyncCheckpointIO, SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_protocols import CheckpointIO

__all__ = [
    "AsyncCheckpointIO",
    "CheckpointIO",
    "SafetensorsCheckpointIO",
    "ShardedCheckpointIO",
    "TorchCheckpointIO",
]
