"""Plugins by the names people look for here: precisions, checkpoint IO and cluster environments."""

from typing import TYPE_CHECKING

from fulmen._layer_sync import TorchSyncBatchNorm
from fulmen._xla_names import from_xla
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

if TYPE_CHECKING:
    from fulmen_xla import XLACheckpointIO as XLACheckpointIO
    from fulmen_xla import XLAEnvironment as XLAEnvironment
    from fulmen_xla import XLAPrecision as XLAPrecision
    from fulmen_xla import XLAShardedCheckpointIO as XLAShardedCheckpointIO

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

# Not in __all__, where a star import without fulmen-xla would end.
_OF_XLA = frozenset({"XLACheckpointIO", "XLAEnvironment", "XLAPrecision", "XLAShardedCheckpointIO"})


def __getattr__(name: str) -> object:
    return from_xla(__name__, name, _OF_XLA)
