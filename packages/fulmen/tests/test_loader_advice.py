"""What the Trainer says about loaders: once each, with the fix."""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import fulmen
from fulmen_fabric import PossibleUserWarning
from fulmen_loggers import CSVLogger

if TYPE_CHECKING:
    from pathlib import Path


class Line(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(samples: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(torch.ones(samples, 2), **{"batch_size": 2, **options})  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return fulmen.Trainer(**{**quiet, **options})


def said(run: fulmen.Trainer, method: str, *loaders: Any, model: Any = None) -> list[str]:
    """The warnings of one call, all of them: none is hidden by having been said before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(run, method)(model or Line(), *loaders)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


class Stream(IterableDataset[Any]):
    def __init__(self, length: int = 4) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return iter(torch.ones(self.length, 2))

    def __len__(self) -> int:
        return self.length


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


@pytest.mark.proves("9.35")
def test_few_workers_are_mentioned_once_for_each_loader_and_trainer() -> None:
    run = trainer()
    first = said(run, "fit", loader(), loader())
    again = said(run, "fit", loader(), loader())

    assert first == [
        f"{name}_dataloader has num_workers=0, so the model may have to wait for batches. Set num_workers=3 in the "
        "DataLoader if making them takes long."
        for name in ("val", "train")
    ]
    assert again == []


def test_no_worker_is_advised_where_there_is_no_core_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    assert said(trainer(), "fit", loader(), loader()) == [], "one core trains, and one worker is no faster"


@pytest.mark.proves("9.35")
def test_enough_workers_are_not_mentioned() -> None:
    assert said(trainer(limit_train_batches=0, limit_val_batches=0), "fit", loader(num_workers=2)) == []


@pytest.mark.proves("9.35")
def test_workers_that_are_spawned_anew_each_epoch_are_mentioned() -> None:
    run = trainer(limit_train_batches=0, limit_val_batches=0)  # the loader is looked at, and no worker is started
    messages = said(run, "fit", loader(num_workers=2, multiprocessing_context="spawn"))

    assert messages == [
        "train_dataloader starts its num_workers=2 workers anew each epoch, which is slow with the start method "
        "'spawn'. Set persistent_workers=True in the DataLoader."
    ]
    kept = loader(num_workers=2, multiprocessing_context="spawn", persistent_workers=True)
    assert said(trainer(limit_train_batches=0, limit_val_batches=0), "fit", kept) == []


@pytest.mark.proves("9.35")
def test_pinned_persistent_workers_that_are_reloaded_are_mentioned() -> None:
    run = trainer(limit_train_batches=0, limit_val_batches=0, reload_dataloaders_every_n_epochs=1)
    messages = said(run, "fit", loader(num_workers=2, persistent_workers=True, pin_memory=True))

    assert len(messages) == 1
    assert "persistent_workers=True and pin_memory=True" in messages[0]
    assert "Set pin_memory=False" in messages[0]


@pytest.mark.proves("9.35")
@pytest.mark.parametrize("method", ["validate", "predict"])
def test_a_shuffled_evaluation_is_mentioned(method: str) -> None:
    stage = {"validate": "val"}.get(method, method)
    shuffled = said(trainer(), method, loader(shuffle=True, num_workers=2))

    assert shuffled == [f"{stage}_dataloader is shuffled. Evaluate in a fixed order: DataLoader(..., shuffle=False)."]
    assert said(trainer(), method, loader(num_workers=2)) == []


@pytest.mark.proves("9.35")
def test_a_sampler_that_repeats_samples_in_evaluation_is_mentioned() -> None:
    def distributed(samples: int) -> Any:
        data = torch.ones(samples, 2)
        sampler: Any = DistributedSampler(data, num_replicas=4, rank=0, shuffle=False)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        return DataLoader(data, sampler=sampler, num_workers=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    assert said(trainer(), "validate", distributed(6)) == [
        "val_dataloader has a DistributedSampler, which gives 2 of 6 samples twice so that its 4 parts are equal. "
        "Leave the sampler out: the Trainer splits the loader so that each sample counts once."
    ]
    assert said(trainer(), "validate", distributed(8)) == [], "nothing is repeated"


@pytest.mark.proves("9.35", "9.36")
def test_a_loader_without_batches_is_mentioned() -> None:
    training = said(trainer(), "fit", loader(0, num_workers=2), loader(0, num_workers=2))

    assert "val_dataloader has no batch, so nothing will be evaluated on it. Check its data set." in training
    assert any(re.match("train_dataloader.* has no batch, so nothing will be trained", text) for text in training)


@pytest.mark.proves("9.35")
def test_a_stream_that_claims_a_length_is_mentioned_where_workers_may_repeat_it() -> None:
    messages = said(trainer(limit_train_batches=0, limit_val_batches=0), "fit", DataLoader(Stream(), num_workers=2))

    assert len(messages) == 1
    assert (
        "the IterableDataset has a __len__, which is wrong if its num_workers=2 workers each give all of it"
        in (messages[0])
    )
    assert "get_worker_info" in messages[0]


@pytest.mark.proves("9.35")
def test_a_log_interval_longer_than_the_epoch_is_mentioned_once(tmp_path: Path) -> None:
    def run(**options: Any) -> fulmen.Trainer:
        return trainer(logger=CSVLogger(tmp_path), **options)

    def messages(made: fulmen.Trainer) -> list[str]:
        return [text for text in said(made, "fit", loader(), loader()) if "num_workers" not in text]

    once = run()
    assert messages(once) == [
        "log_every_n_steps=50, but an epoch has 4 batches, so that step values of an epoch may never reach the "
        "loggers. Give a smaller log_every_n_steps."
    ]
    assert messages(once) == []
    assert messages(run(log_every_n_steps=4)) == []
    assert messages(run(fast_dev_run=True)) == []
    assert messages(trainer()) == [], "nobody to write rows"


@pytest.mark.proves("9.35")
def test_advice_can_be_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "off")

    assert said(trainer(), "validate", loader(shuffle=True)) == []


@pytest.mark.proves("9.35")
def test_advice_is_a_possible_user_warning_that_points_at_the_users_line() -> None:
    with pytest.warns(PossibleUserWarning, match="is shuffled") as caught:
        trainer().validate(Line(), loader(shuffle=True), verbose=False)

    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.proves("9.31")
def test_submodules_in_evaluation_mode_at_the_start_are_counted() -> None:
    model = Line()
    model.layer.eval()
    messages = [text for text in said(trainer(), "fit", loader(), loader(), model=model) if "num_workers" not in text]

    assert messages == [
        "1 module(s) are in evaluation mode at the start of training. If that is not meant, call model.train()."
    ]
