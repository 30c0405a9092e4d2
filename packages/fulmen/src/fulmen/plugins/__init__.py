"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from typing import TYPE_CHECKING

from fulmen._layer_sync import TorchSyncBatchNorm
from fulmen._not_here import elsewhere
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
from fulmen_protocols import CheckpointIO, ClusterEnvironment, LayerSync, Precision
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
    from fulmen_xla import XLACheckpointIO as XLACheckpointIO
    from fulmen_xla import XLAEnvironment as XLAEnvironment
    from fulmen_xla import XLAPrecision as XLAPrecision
    from fulmen_xla import XLAShardedCheckpointIO as XLAShardedCheckpointIO

_REFUSED = {
    "FSDPPrecision": "FSDPStrategy applies every precision itself; write Trainer(precision='bf16-mixed') or "
    "FSDPStrategy(mixed_precision=...)",
}
_ELSEWHERE = {
    "DeepSpeedPrecision": "fulmen_deepspeed",
    "XLACheckpointIO": "fulmen_xla",
    "XLAEnvironment": "fulmen_xla",
    "XLAPrecision": "fulmen_xla",
    "XLAShardedCheckpointIO": "fulmen_xla",
}

__all__ = [
    "AsyncCheckpointIO",
    "BitsandbytesPrecision",
    "CheckpointIO",
    "ClusterEnvironment",
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
        return elsewhere("fulmen.plugins", name, _ELSEWHERE, _REFUSED)
