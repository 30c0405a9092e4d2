"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from fulmen_checkpoint import SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_precision import DoublePrecision, HalfPrecision, MixedPrecision
from fulmen_strategies import LightningEnvironment, TorchElasticEnvironment

__all__ = [
    "DoublePrecision",
    "HalfPrecision",
    "LightningEnvironment",
    "MixedPrecision",
    "SafetensorsCheckpointIO",
    "ShardedCheckpointIO",
    "TorchCheckpointIO",
    "TorchElasticEnvironment",
]
