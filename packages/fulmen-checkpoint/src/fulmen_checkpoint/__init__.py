"""Crash-safe checkpoints on any fsspec storage, for fulmen or for your own loop."""

from fulmen_checkpoint.find import Found, find_last, list_checkpoints, newest_whole
from fulmen_checkpoint.retention import Journal, Retention
from fulmen_checkpoint.storage import FsspecStorage
from fulmen_checkpoint.torch_io import TorchCheckpointIO

__all__ = [
    "Found",
    "FsspecStorage",
    "Journal",
    "Retention",
    "TorchCheckpointIO",
    "find_last",
    "list_checkpoints",
    "newest_whole",
]
