"""Training through the Trainer changes the weights exactly as the loop one writes by hand does: not one bit differs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def data(samples: int = 52) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 8, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


class Classifier(fulmen.LightningModule):
    def __init__(self, net: nn.Module, optimizer: str, schedule: str | None) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.schedule = schedule

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> object:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}


def raw_loop(
    net: nn.Module,
    loader: DataLoader[object],
    optimizer_name: str,
    accumulate: int,
    clip: float | None,
    schedule: str | None,
) -> None:
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    net.train()
    for _ in range(3):
        for index, (x, y) in enumerate(loader):
            loss = F.cross_entropy(net(x), y)
            if accumulate != 1:
                loss = loss / accumulate
            if index % accumulate == 0:
                optimizer.zero_grad()
            loss.backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(loader):
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                if schedule == "step":
                    scheduler.step()
        if schedule == "epoch":
            scheduler.step()


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(got, expected), f"{name} differs by {(got - expected).abs().max()}"


@pytest.mark.proves("9.13", "9.14", "9.41")
@pytest.mark.parametrize("schedule", [None, "step", "epoch"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_after_training_are_bit_identical_to_a_raw_loop(
    optimizer: str, accumulate: int, clip: float | None, schedule: str | None
) -> None:
    ours, theirs = model(), model()

    torch.manual_seed(7)
    raw_loop(theirs, DataLoader(data(), batch_size=8, shuffle=True), optimizer, accumulate, clip, schedule)
    torch.manual_seed(7)
    trainer = fulmen.Trainer(
        barebones=True,
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    trainer.fit(Classifier(ours, optimizer, schedule), DataLoader(data(), batch_size=8, shuffle=True))

    same_weights(ours, theirs)
    assert trainer.current_epoch == 3
    assert trainer.global_step == 3 * -(-7 // accumulate)


def test_everything_a_user_gets_by_default_leaves_the_weights_the_same(tmp_path: object) -> None:
    ours, theirs = model(), model()
    torch.manual_seed(7)
    raw_loop(theirs, DataLoader(data(), batch_size=8, shuffle=True), "adam", 1, None, None)

    class Watched(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", F.cross_entropy(self.net(x), y))

    torch.manual_seed(7)
    trainer = fulmen.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=str(tmp_path), log_every_n_steps=2)
    trainer.fit(
        Watched(ours, "adam", None),
        DataLoader(data(), batch_size=8, shuffle=True),
        # Its own generator: what an evaluation loader draws must not move the training data's order.
        DataLoader(data(20), batch_size=8, generator=torch.Generator()),
    )

    same_weights(ours, theirs)
    assert set(trainer.callback_metrics) == {"loss", "loss_step", "loss_epoch", "val_loss"}


def test_the_loop_can_be_run_with_parts_built_by_hand() -> None:
    from fulmen.fit import FitParts, fit
    from fulmen.hooks import FitHooks
    from fulmen.plan import Plan
    from fulmen.progress import Progress

    ours = nn.Linear(8, 3)
    theirs = copy.deepcopy(ours)
    batches = [(torch.randn(5, 8), torch.randint(0, 3, (5,))) for _ in range(6)]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)

    def accumulate(batch: object, batch_idx: int) -> None:
        x, y = batch  # type: ignore[misc]  # a batch of two
        F.cross_entropy(ours(x), y).backward()

    def step(batch: object, batch_idx: int) -> None:
        accumulate(batch, batch_idx)
        optimizer.step()
        optimizer.zero_grad()

    def epoch() -> Iterable[tuple[object, bool]]:
        return ((batch, index == 5) for index, batch in enumerate(batches))

    progress = Progress()
    fit(FitParts(step, accumulate), Plan(max_epochs=2, batches=6, accumulate=2), FitHooks(), progress, epoch)

    raw = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(2):
        for index, (x, y) in enumerate(batches):
            F.cross_entropy(theirs(x), y).backward()
            if index % 2 == 1:
                raw.step()
                raw.zero_grad()
    same_weights(ours, theirs)
    assert (progress.epoch, progress.updates, progress.total_batches) == (2, 6, 12)
