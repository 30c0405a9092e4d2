"""Timer in a real fit."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import Timer
from fulmen_protocols.errors import MisconfigurationException


class Model(LightningModule):
    def __init__(self, pause_s: float = 0.0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.pause_s = pause_s

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.pause_s)
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(self.pause_s)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(40, 2)), batch_size=2)


def make_trainer(**flags: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{**quiet, "enable_model_summary": False, "accelerator": "cpu", **flags})


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("00:00:00:22", 22),
        ("12:23:34:45", ((12 * 24 + 23) * 60 + 34) * 60 + 45),
        (timedelta(weeks=1), 7 * 86400),
        ({"days": 10, "minutes": 1}, 864060),
        (None, None),
    ],
)
def test_durations_are_given_as_text_timedelta_or_its_arguments(duration: Any, seconds: float | None) -> None:
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("duration", ["6:00:00", "00:00:61:00", "soon", 5, {"years": 1}])
def test_anything_else_is_refused(duration: Any) -> None:
    with pytest.raises(MisconfigurationException, match="duration"):
        Timer(duration)


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'batch'"):
        Timer(interval="batch")


@pytest.mark.proves("11.10")
def test_training_ends_in_mid_epoch_when_its_time_is_up() -> None:
    timer = Timer(timedelta(seconds=0.1))
    trainer = make_trainer(max_epochs=1000, callbacks=[timer])

    trainer.fit(Model(pause_s=0.02), data())

    assert 1 <= trainer.global_step < 20
    remaining = timer.time_remaining()
    assert remaining is not None
    assert remaining <= 0
    assert timer.time_elapsed() >= 0.1


@pytest.mark.proves("11.10")
def test_with_interval_epoch_the_epoch_is_ended_first() -> None:
    trainer = make_trainer(max_epochs=1000, callbacks=[Timer(timedelta(seconds=0.001), interval="epoch")])
    trainer.fit(Model(), data())
    assert trainer.global_step == 20


@pytest.mark.proves("11.10")
def test_every_stage_has_a_clock_of_its_own() -> None:
    timer = Timer()
    trainer = make_trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=2, callbacks=[timer])
    assert timer.start_time() is None
    assert timer.time_elapsed("validate") == 0

    trainer.fit(Validated(pause_s=0.01), data(), data())

    start, end = timer.start_time("train"), timer.end_time("train")
    assert start is not None
    assert end is not None
    assert timer.time_elapsed("train") == pytest.approx(end - start)
    assert timer.time_elapsed("train") >= 0.06, "validation inside of training counts"
    assert timer.time_elapsed("validate") >= 0.02
    assert timer.time_elapsed("sanity_check") >= 0.02
    assert timer.time_elapsed("test") == 0
    with pytest.raises(MisconfigurationException, match="'fit'"):
        timer.time_elapsed("fit")


@pytest.mark.proves("11.10")
def test_tests_and_predictions_have_clocks_too() -> None:
    class Tested(Validated):
        test_step = Validated.validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(self.pause_s)

    timer = Timer()
    trainer = make_trainer(callbacks=[timer], limit_test_batches=2, limit_predict_batches=2)
    trainer.test(Tested(pause_s=0.01), data(), verbose=False)
    trainer.predict(Tested(pause_s=0.01), data(), return_predictions=False)
    assert timer.time_elapsed("test") >= 0.02
    assert timer.time_elapsed("predict") >= 0.02
    assert timer.time_elapsed("train") == 0


def test_a_second_validation_adds_to_the_first() -> None:
    timer = Timer()
    trainer = make_trainer(callbacks=[timer], limit_val_batches=2)
    trainer.validate(Validated(pause_s=0.02), data(), verbose=False)
    once = timer.time_elapsed("validate")
    trainer.validate(Validated(pause_s=0.02), data(), verbose=False)
    assert timer.time_elapsed("validate") >= once + 0.04


@pytest.mark.proves("11.10")
def test_time_spent_before_a_checkpoint_counts_after_resuming(tmp_path: Any) -> None:
    first = make_trainer(max_epochs=1, callbacks=[Timer(timedelta(seconds=1000))])
    first.fit(Model(), data())
    spent = first.callbacks[0].time_elapsed()
    first.save_checkpoint(tmp_path / "run.ckpt")

    timer = Timer(timedelta(seconds=1000))
    second = make_trainer(max_epochs=2, callbacks=[timer])
    second.fit(Model(), data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)

    start, end = timer.start_time(), timer.end_time()
    assert start is not None
    assert end is not None
    assert timer.time_elapsed() == pytest.approx(spent + end - start, abs=0.5)
    assert timer.time_elapsed() > end - start


def test_a_resumed_run_whose_time_is_up_trains_no_more_than_a_batch(tmp_path: Any) -> None:
    first = make_trainer(max_epochs=1, callbacks=[Timer(timedelta(seconds=1000))])
    first.fit(Model(pause_s=0.01), data())
    first.save_checkpoint(tmp_path / "run.ckpt")

    second = make_trainer(max_epochs=1000, callbacks=[Timer(timedelta(seconds=0.1))])
    second.fit(Model(), data(), ckpt_path=tmp_path / "run.ckpt")

    assert second.global_step <= 21


@pytest.mark.proves("9.6", "11.10")
def test_the_trainers_max_time_is_a_timer() -> None:
    trainer = make_trainer(max_epochs=-1, max_time={"seconds": 0.1})
    trainer.fit(Model(pause_s=0.02), data())
    assert 1 <= trainer.global_step < 20
