"""Types of what hooks take and return, for annotations in user code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict

from torch import Tensor, UntypedStorage
from torch import device as _Device
from torch.distributed import ProcessGroup, ReduceOp
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fulmen.optimizer import LRSchedulerConfig

__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "_DEVICE",
    "_EVALUATE_OUTPUT",
    "_MAP_LOCATION_TYPE",
    "_PATH",
    "_PREDICT_OUTPUT",
    "DistributedDataParallel",
    "LRSchedulerConfig",
    "LRSchedulerConfigType",
    "LRSchedulerPLType",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "OptimizerConfig",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
    "ProcessGroup",
    "ReduceOp",
    "UntypedStorage",
]

_PATH = str | Path
_DEVICE = _Device | str | int
_MAP_LOCATION_TYPE = _DEVICE | Callable[[UntypedStorage, str], UntypedStorage | None] | dict[_DEVICE, _DEVICE] | None
_EVALUATE_OUTPUT = list[Mapping[str, float]]
_PREDICT_OUTPUT = list[Any] | list[list[Any]]
"""Lightning's names, which annotations use although they are private there."""

STEP_OUTPUT = Tensor | Mapping[str, Any] | None
"""What ``training_step`` and its siblings return."""
TRAIN_DATALOADERS = Any
"""What ``train_dataloader`` returns: an iterable of batches, or a nested collection of them."""
EVAL_DATALOADERS = Any
"""What ``val_dataloader`` and its siblings return."""

LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion = LRScheduler | ReduceLROnPlateau
LRSchedulerPLType = LRScheduler | ReduceLROnPlateau
LRSchedulerType = type[LRScheduler] | type[ReduceLROnPlateau]


class LRSchedulerConfigType(TypedDict, total=False):
    """A scheduler with when and on what it steps; see ``LRSchedulerConfig``."""

    scheduler: Required[LRSchedulerTypeUnion]
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """An optimizer alone."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict):
    """An optimizer with its scheduler."""

    optimizer: Optimizer
    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType
    monitor: NotRequired[str]


OptimizerLRScheduler = (
    Optimizer
    | Sequence[Optimizer]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfig]]
    | OptimizerConfig
    | OptimizerLRSchedulerConfig
    | Sequence[OptimizerConfig]
    | Sequence[OptimizerLRSchedulerConfig]
    | None
)
"""What ``configure_optimizers`` returns."""
