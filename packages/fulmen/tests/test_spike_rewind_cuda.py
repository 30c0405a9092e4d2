"""SpikeRewind on a CUDA device: copies and checks wait for nothing, and what comes back is what was copied."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, SpikeRewind

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCHES = 32


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(poisoned: int | None = None) -> DataLoader[Any]:
    """Batches that are on the device already, so that moving them waits for nothing."""
    inputs = torch.randn(BATCHES * 4, 6, generator=torch.Generator().manual_seed(5))
    targets = inputs.sum(1, keepdim=True)
    if poisoned is not None:
        targets[poisoned * 4 : poisoned * 4 + 4] = math.nan
    return DataLoader(TensorDataset(inputs.cuda(), targets.cuda()), 4)


def fit(data: DataLoader[Any], *callbacks: Callback) -> Model:
    model = Model()
    run = Trainer(
        accelerator="cuda", devices=1, max_epochs=1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpikeRewind:")
        run.fit(model, data)
    return model


class WaitingIsAnError(Callback):
    """From the fourth batch to the last; the end of an epoch is a declared point."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == BATCHES - 1:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("keep_on", ["host", "device"])
def test_steps_checks_and_copies_wait_for_nothing(keep_on: Any) -> None:
    rewind = SpikeRewind(window=4, factor=1e6, every_n_steps=6, check_every_n_steps=2, keep_on=keep_on)
    try:
        fit(loader(), rewind, WaitingIsAnError())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rewind.rewinds == []


@pytest.mark.parametrize("keep_on", ["host", "device"])
def test_weights_are_those_of_a_loop_that_copies_and_restores_by_hand(keep_on: Any) -> None:
    rewind = SpikeRewind(window=4, factor=1e6, every_n_steps=6, check_every_n_steps=2, keep_on=keep_on)
    model = fit(loader(8), rewind)

    plain = network().cuda()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    kept: list[Any] = []
    for step, (inputs, targets) in enumerate(loader(8)):
        if step == 12:
            plain.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
        if step == 6:
            kept = copy.deepcopy([plain.state_dict(), optimizer.state_dict()])
        optimizer.zero_grad()
        F.mse_loss(plain(inputs), targets).backward()
        optimizer.step()

    assert [(each.step, each.back_to) for each in rewind.rewinds] == [(9, 6)]
    for ours, theirs in zip(model.net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())
