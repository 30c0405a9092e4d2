"""``LayerSync`` and ``TorchSyncBatchNorm``, where Lightning has them."""

from fulmen._layer_sync import TorchSyncBatchNorm
from fulmen_protocols import LayerSync

__all__ = ["LayerSync", "TorchSyncBatchNorm"]
