"""Worker processes of loaders end with the call that used them, and not when objects are collected."""

from __future__ import annotations

import gc
import multiprocessing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fulmen import LightningModule, Trainer
from fulmen.utilities import CombinedLoader
from fulmen_data import end_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.processes


class Numbers(IterableDataset[torch.Tensor]):
    """An iterable data set that knows its place."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.given < 8:
            self.given += 1
            yield torch.full((2,), float(self.given))
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def kept() -> DataLoader[Any]:
    """A loader that keeps its two workers between epochs."""
    return DataLoader(torch.randn(12, 2), batch_size=2, num_workers=2, persistent_workers=True)  # type: ignore[arg-type]  # torch takes any sequence


def kept_iterable() -> DataLoader[Any]:
    return DataLoader(Numbers(), batch_size=2, num_workers=2, persistent_workers=True)


def combined() -> CombinedLoader:
    return CombinedLoader({"one": kept(), "two": kept_iterable()}, "max_size_cycle")


class Model(LightningModule):
    """Its loaders come from hooks, so that nobody but the Trainer holds them."""

    def __init__(self, make: Callable[[], Any] = kept, *, fails_at: int = -1) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.make, self.fails_at, self.most_workers = make, fails_at, 0

    def _loss(self, batch: Any) -> torch.Tensor:
        self.most_workers = max(self.most_workers, len(multiprocessing.active_children()))
        if isinstance(batch, dict):
            batch = batch["one"]
        return self.layer(batch).mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fails_at:
            raise ZeroDivisionError
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._loss(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return self.make()

    def val_dataloader(self) -> Any:
        return self.make()

    def test_dataloader(self) -> Any:
        return self.make()

    def predict_dataloader(self) -> Any:
        return kept()


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **{"max_epochs": 2, **options})


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    """Workers of earlier tests do not count here, and none is left behind."""
    gc.collect()
    assert multiprocessing.active_children() == []
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore::fulmen_fabric.PossibleUserWarning")
@pytest.mark.parametrize("make", [kept, kept_iterable, combined], ids=["indices", "iterable", "combined"])
@pytest.mark.parametrize("options", [{}, {"max_steps": 8}], ids=["whole epochs", "stopped within an epoch"])
def test_workers_that_are_kept_between_epochs_end_with_the_fit(
    make: Callable[[], Any], options: dict[str, Any]
) -> None:
    model = Model(make)
    runs = trainer(**options)
    runs.fit(model)

    assert multiprocessing.active_children() == []
    # They were there, those of training and of validation, and were kept: never more than one set of each.
    assert model.most_workers == 2 * 2 * (2 if make is combined else 1)


@pytest.mark.filterwarnings("ignore::fulmen_fabric.PossibleUserWarning")
def test_workers_end_with_a_fit_that_fails() -> None:
    model = Model(fails_at=3)
    with pytest.raises(ZeroDivisionError):
        trainer().fit(model)

    assert multiprocessing.active_children() == []
    assert model.most_workers == 4


@pytest.mark.filterwarnings("ignore::fulmen_fabric.PossibleUserWarning")
@pytest.mark.parametrize("call", ["validate", "test", "predict"])
@pytest.mark.parametrize("make", [kept, partial(CombinedLoader, [kept(), kept()], "sequential")], ids=["one", "two"])
def test_workers_end_with_an_evaluation(call: str, make: Callable[[], Any]) -> None:
    model = Model(make)
    getattr(trainer(), call)(model)

    assert multiprocessing.active_children() == []
    assert model.most_workers >= 2


@pytest.mark.filterwarnings("ignore::fulmen_fabric.PossibleUserWarning")
def test_workers_of_a_loader_that_is_replaced_end_before_the_new_ones_start() -> None:
    model = Model()
    trainer(reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(model)

    assert model.most_workers == 4


def test_a_users_loader_starts_new_workers_after_a_fit() -> None:
    loader = kept()
    model = Model()
    trainer(max_epochs=1).fit(model, loader, kept())

    assert multiprocessing.active_children() == []
    assert len(list(loader)) == 6
    end_workers(loader)
