"""The finer points of order: what a scaled step shows to hooks, and who sees what at the end of an epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import EarlyStopping

QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1, bias=False)
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self.layer.weight.grad is not None
        self.seen.append(self.layer.weight.grad.clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def ones() -> DataLoader[Any]:
    return DataLoader(torch.ones(2, 2), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


@pytest.mark.proves("3.6")
def test_hooks_and_clipping_see_unscaled_gradients_and_hooks_see_them_before_clipping() -> None:
    class Small(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0.01 * self.layer(batch).float().sum()  # times the scale of 65,536 this fits into float16

    model = Small()
    before = model.layer.weight.detach().clone()
    fulmen.Trainer(**QUIET, precision="16-mixed", gradient_clip_val=0.005).fit(model, ones())

    # d(loss)/d(weight) is 0.01 times the sum of two rows of ones; its norm is 0.02 sqrt(2), clipped to 0.005.
    assert torch.allclose(model.seen[0], torch.full((1, 2), 0.02), rtol=1e-3)
    assert (before - model.layer.weight).norm().item() == pytest.approx(0.005, rel=1e-2)


@pytest.mark.proves("3.17")
def test_a_clipping_value_of_zero_clips_nothing() -> None:
    model = Model()
    before = model.layer.weight.detach().clone()
    fulmen.Trainer(**QUIET, gradient_clip_val=0).fit(model, ones())

    assert torch.allclose(before - model.layer.weight, torch.full((1, 2), 2.0))


@pytest.mark.proves("9.29")
def test_callbacks_that_watch_metrics_come_after_the_module_at_the_end_of_an_epoch() -> None:
    order: list[str] = []

    class Ordinary(fulmen.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            order.append("callback")

    class Watching(EarlyStopping):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            order.append(f"watching {float(trainer.callback_metrics['late'])}")
            super().on_train_epoch_end(trainer, pl_module)

    class Late(Model):
        def on_train_epoch_end(self) -> None:
            order.append("module")
            self.log("late", 4.0)

    fulmen.Trainer(**QUIET, callbacks=[Watching("late"), Ordinary()]).fit(Late(), ones())

    assert order == ["callback", "module", "watching 4.0"]
