"""How checkpoints are written, where Lightning has it."""

from typing import TYPE_CHECKING

from fulmen._not_here import elsewhere
from fulmen_checkpoint import AsyncCheckpointIO, SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_protocols import CheckpointIO

if TYPE_CHECKING:
    from fulmen_xla import XLACheckpointIO as XLACheckpointIO

_ELSEWHERE = {"XLACheckpointIO": "fulmen.plugins"}

__all__ = [
    "AsyncCheckpointIO",
    "CheckpointIO",
    "SafetensorsCheckpointIO",
    "ShardedCheckpointIO",
    "TorchCheckpointIO",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return elsewhere("fulmen.plugins.io", name, _ELSEWHERE, {})
