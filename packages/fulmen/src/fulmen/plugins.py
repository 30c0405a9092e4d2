"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from fulmen._layer_sync import TorchSyncBatchNorm
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
from fulmen_strategies import (
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

__all__ = [
    "AsyncCheckpointIO",
    "BitsandbytesPrecision",
    "DoublePrecision",
    "Float8Precision",
    "HalfPrecision",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "MixedPrecision",
    "SLURMEnvironment",
    "SafetensorsCheckpointIO",
    "ShardedCheckpointIO",
    "StochasticHalfPrecision",
    "TorchCheckpointIO",
    "TorchElasticEnvironment",
    "TorchSyncBatchNorm",
    "TransformerEnginePrecision",
]
