"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from fulmen_checkpoint import (
    AsyncCheckpointIO,
    SafetensorsCheckpointIO,
    ShardedCheckpointIO,
    TorchCheckpointIO,
)
from fulmen_precision import (
    BitsandbytesPrecision,
    DoublePrecision,
    Float8Precision,
    HalfPrecision,
    MixedPrecision,
    StochasticHalfPrecision,
    TransformerEnginePrecision,
)
from fulmen_strategies import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

__all__ = [
    "AsyncCheckpointIO",
    "BitsandbytesPrecision",
    "DoublePrecision",
    "Float8Precision",
    "HalfPrecision",
    "LightningEnvironment",
    "MixedPrecision",
    "SLURMEnvironment",
    "SafetensorsCheckpointIO",
    "ShardedCheckpointIO",
    "StochasticHalfPrecision",
    "TorchCheckpointIO",
    "TorchElasticEnvironment",
    "TransformerEnginePrecision",
]
