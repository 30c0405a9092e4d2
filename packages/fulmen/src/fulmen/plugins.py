"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from fulmen_protocols import MissingPackage
from fulmen_strategies import (
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

if TYPE_CHECKING:
    from fulmen_deepspeed import DeepSpeedPrecision as DeepSpeedPrecision

__all__ = [
    "AsyncCheckpointIO",
    "BitsandbytesPrecision",
    "DeepSpeedPrecision",
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


def __getattr__(name: str) -> object:
    if name != "DeepSpeedPrecision":
        raise AttributeError(f"module 'fulmen.plugins' has no attribute {name!r}")
    try:
        from fulmen_deepspeed import DeepSpeedPrecision
    except ModuleNotFoundError as error:
        if error.name != "fulmen_deepspeed":
            raise
        raise MissingPackage(
            f"{name} needs a package that is not installed. Run: pip install 'fulmen[deepspeed]'"
        ) from error
    globals()[name] = DeepSpeedPrecision
    return DeepSpeedPrecision
