from typing import Any

from torch import Tensor
from torch.optim import Optimizer

class Trainer:
    current_epoch: int
    global_step: int
    global_rank: int
    local_rank: int
    world_size: int
    loggers: list[Any]
    barebones: bool
    strategy: Any
    _manual: Any
    optimizers: list[Optimizer]
    lr_scheduler_configs: list[Any]
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    callback_metrics: dict[str, Tensor]
    is_global_zero: bool
    default_root_dir: str
    state: Any
    sanity_checking: bool
    fast_dev_run: bool | int
    val_check_interval: int | float
    check_val_every_n_epoch: int | None
    should_stop: bool
    ckpt_path: str | None
    num_val_batches: list[int | float]
    enable_validation: bool
    max_epochs: int | None
    min_steps: int | None
    def print(self, *args: Any, **kwargs: Any) -> None: ...
    def save_checkpoint(self, filepath: str, weights_only: bool | None = None) -> None: ...
