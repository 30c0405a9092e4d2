"""Callbacks that a library pickles with its models, and loads with a list of classes that it allows."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import Callback, EarlyStopping, ModelCheckpoint
from fulmen.callbacks.early_stopping import EarlyStoppingReason

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:log_every_n_steps")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Falling(fulmen.LightningModule):
    """Logs 3, 2, 2, 2, ... as its validation loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", 3.0 if self.current_epoch == 0 else 2.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(*callbacks: Callback) -> fulmen.Trainer:
    trainer = fulmen.Trainer(
        accelerator="cpu", max_epochs=9, logger=False, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data: Any = torch.ones(2, 2)
    trainer.fit(Falling(), DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    return trainer


class OnlyCallbacks(pickle.Unpickler):
    """Refuses what is ours and no callback."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module.startswith("fulmen") and not (isinstance(found, type) and issubclass(found, Callback)):
            assert found is EarlyStoppingReason, f"{module}.{name}"  # an enumeration, as in Lightning
        return found


def through_pickle(callback: Any, tmp_path: Any) -> Any:
    file = tmp_path / "callback.pkl"
    file.write_bytes(pickle.dumps(callback))
    with file.open("rb") as stream:
        return OnlyCallbacks(stream).load()


def test_pickled_callbacks_need_no_class_of_ours_but_callbacks(tmp_path: Any) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", monitor="loss", train_time_interval=timedelta(hours=1))

    assert through_pickle(EarlyStopping("loss", patience=7), tmp_path).patience == 7
    assert through_pickle(kept, tmp_path).monitor == "loss"


def test_a_callback_works_after_it_was_pickled_before_and_after_a_fit(tmp_path: Any) -> None:
    stopping = through_pickle(EarlyStopping("loss", patience=2), tmp_path)
    checkpoint = through_pickle(ModelCheckpoint(tmp_path / "kept", monitor="loss"), tmp_path)
    first = fitted(stopping, checkpoint)

    assert first.current_epoch == 4
    stopping, checkpoint = through_pickle(stopping, tmp_path), through_pickle(checkpoint, tmp_path)
    assert (stopping.wait_count, stopping.stopped_epoch) == (2, 3)
    assert checkpoint.best_model_score == 2
    assert fitted(stopping).current_epoch == 1  # its patience was used up
