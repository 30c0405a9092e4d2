"""What a type checker finds at Lightning's deep paths: read by mypy and pyright (``tools.check_types``), never run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.accelerators.cuda import num_cuda_devices
from fulmen.callbacks.progress.tqdm_progress import Tqdm, convert_inf
from fulmen.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from fulmen.core.mixins import HyperparametersMixin
from fulmen.core.saving import save_hparams_to_yaml
from fulmen.plugins.environments.slurm import SLURMEnvironment
from fulmen.plugins.io.async_plugin import AsyncCheckpointIO
from fulmen.plugins.precision.amp import MixedPrecision
from fulmen.strategies.deepspeed import DeepSpeedStrategy
from fulmen.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

if TYPE_CHECKING:
    from fulmen.utilities.model_summary.model_summary import ModelSummary
    from fulmen.utilities.types import _PATH

Parts = SLURMEnvironment | AsyncCheckpointIO | MixedPrecision | DeepSpeedStrategy


class Mixed(ModelHooks, DataHooks, CheckpointHooks, HyperparametersMixin):
    def setup(self, stage: str) -> None:
        self.devices: int = num_cuda_devices()


def total(bar: Tqdm[int], batches: float) -> float | None:
    bar.total = convert_inf(batches)
    return bar.total


def written(path: _PATH, summary: ModelSummary) -> str:
    save_hparams_to_yaml(path, {"parameters": summary.total_parameters})
    return str(convert_zero_checkpoint_to_fp32_state_dict(path, path)["epoch"])
