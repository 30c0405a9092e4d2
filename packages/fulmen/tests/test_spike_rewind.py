"""SpikeRewind in fits of one process: weights against a loop by hand, resuming, limits, and what it asks of the device."""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    Rewind,
    SpikeRewind,
    TooManyRewindsError,
)
from fulmen.loggers import CSVLogger
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:checkpoints are saved in", "ignore:the checkpoint folder")

BATCH = 4
POISON = {"nan": math.nan, "huge": 1e4}


def data(batches: int, poisoned: Mapping[int, float]) -> TensorDataset:
    """Noise around a plane; the targets of poisoned batches are replaced."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    targets = inputs.sum(1, keepdim=True) * 0.1 + 1 + 0.1 * torch.randn(batches * BATCH, 1, generator=generator)
    for index, value in poisoned.items():
        targets[index * BATCH : (index + 1) * BATCH] = value
    return TensorDataset(inputs, targets)


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.ReLU(), nn.Linear(5, 1))


def optimizer_and_schedule(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.8)


class Model(LightningModule):
    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.net = network()
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            schedule: Any = self.lr_schedulers()
            schedule.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_and_schedule(self)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def trainer(*callbacks: Callback, **flags: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    return Trainer(**{"accelerator": "cpu", "callbacks": list(callbacks), "enable_model_summary": False, **quiet, **flags})


def fit(
    model: LightningModule, loader: DataLoader[Any], *callbacks: Callback, resume: Path | None = None, **flags: Any
) -> Trainer:
    """A fit whose returns to earlier weights are expected."""
    run = trainer(*callbacks, **flags)
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpikeRewind:")
        run.fit(model, loader, ckpt_path=resume)
    return run


def state_of(run: Trainer, model: Model) -> list[Any]:
    optimizer = run.optimizers[0].state_dict()
    return [
        *model.net.state_dict().values(),
        *(value for each in optimizer["state"].values() for value in each.values()),
        [group["lr"] for group in optimizer["param_groups"]],
        run.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
    ]


def same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    assert len(ours) == len(theirs)
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(ours, theirs, strict=True)
    )


def by_hand(
    samples: TensorDataset, *, snapshots: Sequence[int], back: Mapping[int, int], epochs: int = 1, accumulate: int = 1
) -> list[Any]:
    """A plain loop. ``snapshots``: steps after which to copy; ``back``: after which step to go to which copy."""
    model = network()
    optimizer, schedule = optimizer_and_schedule(model)
    kept: dict[int, Any] = {}
    torch.manual_seed(11)
    loader = DataLoader(samples, BATCH)
    step = 0
    for _ in range(epochs):
        for index, (inputs, targets) in enumerate(loader):
            if index % accumulate == 0:
                if step in back:
                    for part, state in zip((model, optimizer, schedule), kept[back[step]], strict=True):
                        part.load_state_dict(copy.deepcopy(state))
                if step in snapshots:
                    kept[step] = copy.deepcopy([part.state_dict() for part in (model, optimizer, schedule)])
                optimizer.zero_grad()
            (F.mse_loss(model(inputs), targets) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(loader):
                optimizer.step()
                schedule.step()
                step += 1
    moments = [value for each in optimizer.state_dict()["state"].values() for value in each.values()]
    rates = [group["lr"] for group in optimizer.param_groups]
    return [*model.state_dict().values(), *moments, rates, schedule.last_epoch]


@pytest.mark.parametrize("keep_on", ["host", "device"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("poison", ["nan", "huge"])
def test_weights_are_those_of_a_loop_that_copies_and_restores_by_hand(poison: str, manual: bool, keep_on: Any) -> None:
    samples = data(20, {8: POISON[poison]})
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6, check_every_n_steps=2, keep_on=keep_on)
    model = Model(manual=manual)
    run = fit(model, DataLoader(samples, BATCH), rewind)

    # Step 9 is on its way after step 10 and judged after step 12; the copy of step 6 is older than step 8.
    assert same(state_of(run, model), by_hand(samples, snapshots=[0, 6, 18], back={12: 6}))
    (event,) = rewind.rewinds
    assert (event.step, event.rank, event.noticed_at, event.back_to) == (9, 0, 12, 6)
    assert event.batches == tuple((0, index) for index in range(6, 12))
    assert rewind.dropped_batches == list(event.batches)
    assert math.isnan(event.value) if poison == "nan" else event.value > 1e6
    assert (event.threshold is None) == (poison == "nan")
    assert run.global_step == 20
    assert rewind.steps_undone == 6


def test_without_a_spike_nothing_changes() -> None:
    samples = data(20, {})
    model = Model()
    rewind = SpikeRewind(window=4, factor=10.0, every_n_steps=6)
    run = fit(model, DataLoader(samples, BATCH), rewind)

    assert same(state_of(run, model), by_hand(samples, snapshots=[], back={}))
    assert rewind.rewinds == []
