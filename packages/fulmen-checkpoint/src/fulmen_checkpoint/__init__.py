"""Crash-safe checkpoints on any fsspec storage, for fulmen or for your own loop.

Each name is imported when it is first used, so that ``fulmen --help`` need not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen_checkpoint.async_io import AsyncCheckpointIO as AsyncCheckpointIO
    from fulmen_checkpoint.conversion import consolidate as consolidate
    from fulmen_checkpoint.conversion import convert as convert
    from fulmen_checkpoint.find import Found as Found
    from fulmen_checkpoint.find import find_last as find_last
    from fulmen_checkpoint.find import list_checkpoints as list_checkpoints
    from fulmen_checkpoint.find import newest_whole as newest_whole
    from fulmen_checkpoint.migration import migrate as migrate
    from fulmen_checkpoint.retention import Journal as Journal
    from fulmen_checkpoint.retention import Retention as Retention
    from fulmen_checkpoint.safetensors import SafetensorsCheckpointIO as SafetensorsCheckpointIO
    from fulmen_checkpoint.serializers import PackedObject as PackedObject
    from fulmen_checkpoint.serializers import register_serializer as register_serializer
    from fulmen_checkpoint.sharded import ShardedCheckpointIO as ShardedCheckpointIO
    from fulmen_checkpoint.storage import FsspecStorage as FsspecStorage
    from fulmen_checkpoint.torch_io import TorchCheckpointIO as TorchCheckpointIO
    from fulmen_checkpoint.upgrading import upgrade as upgrade

__all__ = [
    "AsyncCheckpointIO",
    "Found",
    "FsspecStorage",
    "Journal",
    "PackedObject",
    "Retention",
    "SafetensorsCheckpointIO",
    "ShardedCheckpointIO",
    "TorchCheckpointIO",
    "consolidate",
    "convert",
    "find_last",
    "list_checkpoints",
    "migrate",
    "newest_whole",
    "register_serializer",
    "upgrade",
]

_HOME = {
    "AsyncCheckpointIO": "async_io",
    "Found": "find",
    "FsspecStorage": "storage",
    "Journal": "retention",
    "PackedObject": "serializers",
    "Retention": "retention",
    "SafetensorsCheckpointIO": "safetensors",
    "ShardedCheckpointIO": "sharded",
    "TorchCheckpointIO": "torch_io",
    "consolidate": "conversion",
    "convert": "conversion",
    "find_last": "find",
    "list_checkpoints": "find",
    "migrate": "migration",
    "newest_whole": "find",
    "register_serializer": "serializers",
    "upgrade": "upgrading",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value: object = getattr(import_module(f"fulmen_checkpoint.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fulmen_checkpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
