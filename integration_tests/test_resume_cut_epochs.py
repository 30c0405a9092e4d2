"""A run may end inside an epoch: by max_steps, max_time or a callback. A longer one goes on at the next batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, ModelCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BATCHES = 8


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4 * BATCHES, 8, generator=generator), torch.randint(0, 3, (4 * BATCHES,), generator=generator)
    return TensorDataset(x, y)


class Counting:
    """A loader with a place of its own."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        x, y = dataset().tensors
        self.at %= BATCHES
        while self.at < BATCHES:
            rows = slice(4 * self.at, 4 * self.at + 4)
            self.at += 1
            yield [x[rows], y[rows]]

    def __len__(self) -> int:
        return BATCHES

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = state_dict["at"]


class Model(fulmen.LightningModule):
    """Notes what it was trained on, when epochs began, and what was the mean of each."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
        self.ledger: list[tuple[Any, ...]] = []
        self.means: dict[int, float] = {}

    def on_train_epoch_start(self) -> None:
        self.ledger.append(("epoch", self.current_epoch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ledger.append((self.current_epoch, batch_idx, float(batch[0].sum())))
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.means[self.current_epoch] = float(self.trainer.callback_metrics["loss"])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        by_step = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch"}]


class StopsAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            trainer.should_stop = True


def train(
    *, ckpt_path: Path | None = None, loader: Any = None, callbacks: Any = (), **options: Any
) -> tuple[Any, Model]:
    torch.manual_seed(3 if ckpt_path is None else 99)
    trainer = fulmen.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    model = Model()
    trainer.fit(
        model, DataLoader(dataset(), batch_size=4, shuffle=True) if loader is None else loader, ckpt_path=ckpt_path
    )
    return trainer, model


def state(trainer: Any, model: nn.Module) -> dict[str, Any]:
    optimizer = trainer.optimizers[0].state_dict()
    return {
        "weights": [value.tolist() for value in model.state_dict().values()],
        "moments": [[value.tolist() for value in entry.values()] for entry in optimizer["state"].values()],
        "rates": [group["lr"] for group in optimizer["param_groups"]],
        "counters": (trainer.global_step, trainer.current_epoch),
    }


def assert_goes_on(whole: tuple[Any, Model], first: tuple[Any, Model], second: tuple[Any, Model]) -> None:
    """``second`` read exactly what ``first`` had left of what ``whole`` read, and ended with its bits."""
    assert first[1].ledger + second[1].ledger == whole[1].ledger
    assert state(*second) == state(*whole)
    assert second[1].means == {epoch: whole[1].means[epoch] for epoch in second[1].means}


@pytest.mark.proves("5.39")
@pytest.mark.parametrize("cut", [3, 8, 11, 16])
@pytest.mark.parametrize("make", [None, Counting], ids=["indices", "own place"])
def test_a_run_with_more_steps_goes_on_where_max_steps_ended_the_first(cut: int, make: Any, tmp_path: Path) -> None:
    limits = {"max_epochs": -1}
    whole = train(loader=make and make(), max_steps=21, **limits)
    first = train(loader=make and make(), max_steps=cut, **limits)
    assert first[0].current_epoch == -(-cut // BATCHES)  # as ever: an epoch that was begun is over
    first[0].save_checkpoint(tmp_path / "end.ckpt")
    second = train(ckpt_path=tmp_path / "end.ckpt", loader=make and make(), max_steps=21, **limits)
    assert_goes_on(whole, first, second)
    again = train(ckpt_path=tmp_path / "end.ckpt", loader=make and make(), max_steps=cut, **limits)
    assert again[1].ledger == []
    assert state(*again) == state(*first)


@pytest.mark.proves("5.39")
def test_so_it_does_from_a_checkpoint_that_the_end_of_the_epoch_wrote(tmp_path: Path) -> None:
    def saving(folder: str) -> dict[str, Any]:
        callback = ModelCheckpoint(tmp_path / folder, save_last=True, save_top_k=-1)
        return {"callbacks": [callback], "enable_checkpointing": True, "max_epochs": -1}

    whole = train(max_steps=21, **saving("whole"))
    first = train(max_steps=11, **saving("parts"))
    second = train(ckpt_path=tmp_path / "parts" / "last.ckpt", max_steps=21, **saving("parts"))
    assert_goes_on(whole, first, second)


@pytest.mark.proves("5.39")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_that_was_asked_to_stop_has_the_rest_of_its_epoch_still_to_do(accumulate: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    whole = train(**options)
    first = train(callbacks=[StopsAfter(4)], **options)
    first[0].save_checkpoint(tmp_path / "end.ckpt")
    second = train(ckpt_path=tmp_path / "end.ckpt", **options)
    assert_goes_on(whole, first, second)


@pytest.mark.proves("5.39")
def test_a_stop_again_and_again_loses_and_repeats_nothing(tmp_path: Path) -> None:
    whole = train(max_epochs=3)
    parts = [train(max_epochs=3, callbacks=[StopsAfter(5)])]
    for end in (7, 15, 19, 100):
        parts[-1][0].save_checkpoint(tmp_path / "end.ckpt")
        parts.append(train(max_epochs=3, ckpt_path=tmp_path / "end.ckpt", callbacks=[StopsAfter(end)]))
    assert [entry for _, model in parts for entry in model.ledger] == whole[1].ledger
    assert state(*parts[-1]) == state(*whole)


@pytest.mark.proves("5.39")
def test_after_an_evaluation_the_checkpoint_still_holds_the_place(tmp_path: Path) -> None:
    whole = train(max_epochs=-1, max_steps=13)
    first = train(max_epochs=-1, max_steps=5)
    trainer, model = first
    trainer.test(model, DataLoader(dataset(), batch_size=8), verbose=False)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second = train(ckpt_path=tmp_path / "end.ckpt", max_epochs=-1, max_steps=13)
    assert_goes_on(whole, first, second)


@pytest.mark.proves("5.39")
def test_another_fit_of_the_same_trainer_begins_an_epoch_and_so_does_its_checkpoint(tmp_path: Path) -> None:
    trainer, model = train(max_epochs=-1, max_steps=5)
    model.ledger.clear()
    trainer.max_steps = 8
    trainer.fit(model, DataLoader(dataset(), batch_size=4, shuffle=True))
    assert [entry[:2] for entry in model.ledger] == [("epoch", 1), (1, 0), (1, 1), (1, 2)]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    _, second = train(ckpt_path=tmp_path / "end.ckpt", max_epochs=-1, max_steps=10)
    assert [entry[:2] for entry in second.ledger] == [(1, 3), (1, 4)]


@pytest.mark.proves("5.39")
def test_what_has_no_place_is_named_when_such_a_checkpoint_is_saved(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(dataset())

    def loader() -> Any:
        return DataLoader(Stream(), batch_size=4)

    trainer, _ = train(max_epochs=-1, max_steps=5, loader=loader())
    with pytest.warns(UserWarning, match="its place in Stream is not in it"):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
