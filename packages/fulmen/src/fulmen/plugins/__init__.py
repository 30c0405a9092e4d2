"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._layer_sync import TorchSyncBatchNorm
from fulmen._not_here import not_here
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
    FullPrecision,
    HalfPrecision,
    MixedPrecision,
    StochasticHalfPrecision,
    TransformerEnginePrecision,
)
from fulmen_protocols import CheckpointIO, ClusterEnvironment, LayerSync, MissingPackage, Precision
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

_REFUSED = {
    "FSDPPrecision": "FSDPStrategy applies every precision itself; write Trainer(precision='bf16-mixed') or "
    "FSDPStrategy(mixed_precision=...)",
}

__all__ = [
    "AsyncCheckpointIO",
    "BitsandbytesPrecision",
    "CheckpointIO",
    "ClusterEnvironment",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "Float8Precision",
    "FullPrecision",
    "HalfPrecision",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LayerSync",
    "LightningEnvironment",
    "MPIEnvironment",
    "MixedPrecision",
    "Precision",
    "SLURMEnvironment",
    "SafetensorsCheckpointIO",
    "ShardedCheckpointIO",
    "StochasticHalfPrecision",
    "TorchCheckpointIO",
    "TorchElasticEnvironment",
    "TorchSyncBatchNorm",
    "TransformerEnginePrecision",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name != "DeepSpeedPrecision":
            raise not_here("fulmen.plugins", name, _REFUSED)
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
