"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from fulmen_checkpoint import AsyncCheckpointIO, TorchCheckpointIO
from fulmen_precision import DoublePrecision, HalfPrecision, MixedPrecision
from fulmen_strategies import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

__all__ = [
    "AsyncCheckpointIO",
    "DoublePrecision",
    "HalfPrecision",
    "LightningEnvironment",
    "MixedPrecision",
    "SLURMEnvironment",
    "TorchCheckpointIO",
    "TorchElasticEnvironment",
]
