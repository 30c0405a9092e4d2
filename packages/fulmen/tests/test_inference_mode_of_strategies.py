"""A strategy whose devices do not know inference mode evaluates without gradients, and without that mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen_strategies import SingleDeviceStrategy

if TYPE_CHECKING:
    from pathlib import Path


class Lazy(SingleDeviceStrategy):
    allows_inference_mode = False


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@pytest.mark.proves("9.16")
@pytest.mark.parametrize(("strategy", "inference_mode"), [(Lazy, False), (SingleDeviceStrategy, True)])
def test_predicting_takes_inference_mode_only_where_the_strategy_knows_it(
    strategy: type[SingleDeviceStrategy], inference_mode: bool, tmp_path: Path
) -> None:
    trainer = fulmen.Trainer(
        accelerator="cpu",
        strategy=strategy(),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )

    seen = trainer.predict(Model(), DataLoader(TensorDataset(torch.zeros(2, 2))))

    assert seen == [(inference_mode, False), (inference_mode, False)]
