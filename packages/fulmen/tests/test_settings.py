"""Every wrong argument of the Trainer gets one error that names flag, value and fix, before anything starts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

import fulmen
from fulmen.settings import parse_duration


@pytest.mark.proves("9.55")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_epochs": -2}, "max_epochs=-2 must be at least -1; -1 means no limit"),
        ({"max_epochs": 1.5}, "max_epochs=1.5 must be a whole number"),
        ({"max_steps": -3}, "max_steps=-3 must be at least -1"),
        ({"min_epochs": -1}, "min_epochs=-1 must be at least 0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 must be at least 1"),
        ({"accumulate_grad_batches": True}, "accumulate_grad_batches=True must be a whole number"),
        ({"limit_train_batches": 1.5}, "limit_train_batches=1.5: a float is a fraction"),
        ({"limit_val_batches": -1}, "limit_val_batches=-1 must not be negative"),
        ({"limit_test_batches": "all"}, "limit_test_batches='all' must be a number of batches"),
        ({"overfit_batches": 2.0}, "overfit_batches=2.0: a float is a fraction and must lie in [0, 1]; write 2"),
        ({"val_check_interval": 0}, "val_check_interval=0 must be at least 1 batch"),
        ({"val_check_interval": 1.2}, "val_check_interval=1.2: a float is a fraction"),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": None}, "check_val_every_n_epoch=None counts across"),
        ({"val_check_interval": "soon"}, "val_check_interval='soon' is no duration. Give 'DD:HH:MM:SS'"),
        ({"max_time": "1:00"}, "max_time='1:00' is no duration"),
        ({"fast_dev_run": -1}, "fast_dev_run=-1 must be at least 0"),
        ({"fast_dev_run": "yes"}, "fast_dev_run='yes' must be True, False or a number of batches"),
        ({"gradient_clip_val": "1"}, "gradient_clip_val='1' must be a number"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val=nan must be finite; None turns clipping off"),
        ({"gradient_clip_val": float("inf")}, "gradient_clip_val=inf must be finite"),
        (
            {"loss_weighting": "sum"},
            "loss_weighting='sum' must be 'mean' (training_step returns a mean; the default) or",
        ),
        ({"loss_weighting": True}, "loss_weighting=True must be 'mean'"),
        ({"gradient_clip_algorithm": "mean"}, "gradient_clip_algorithm='mean' must be 'norm' or 'value'"),
        ({"num_sanity_val_steps": -2}, "num_sanity_val_steps=-2 must be at least -1"),
        ({"log_every_n_steps": -1}, "log_every_n_steps=-1 must be at least 0"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0 must be at least 1"),
        ({"reload_dataloaders_every_n_epochs": -1}, "reload_dataloaders_every_n_epochs=-1 must be at least 0"),
        ({"deterministic": "maybe"}, "deterministic='maybe' must be True, False or 'warn'"),
        ({"barebones": True, "logger": True}, "barebones=True turns logger off"),
        ({"barebones": True, "enable_progress_bar": True}, "barebones=True turns enable_progress_bar off"),
        ({"accelerator": "gpuu"}, "gpuu"),
        ({"accelerator": "cpu", "strategy": "ddpp"}, "no strategy is named 'ddpp'. Did you mean 'ddp'?"),
        ({"accelerator": "cpu", "precision": "bf16-mix"}, "Did you mean 'bf16-mixed'?"),
        ({"accelerator": "cpu", "devices": 0}, "0"),
        ({"accelerator": "cpu", "num_nodes": 0}, "num_nodes=0"),
        ({"accelerator": "cpu", "devices": 2, "strategy": "single_device"}, "single_device"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value_and_the_fix(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)) as raised:
        fulmen.Trainer(**{"logger": False, **arguments})

    assert says in str(raised.value)


@pytest.mark.proves("9.55")
def test_several_wrong_arguments_are_told_in_one_error() -> None:
    with pytest.raises(ValueError, match="max_epochs=-5") as raised:
        fulmen.Trainer(max_epochs=-5, limit_val_batches=-1, gradient_clip_algorithm="mean", logger=False)

    assert "limit_val_batches=-1" in str(raised.value)
    assert "gradient_clip_algorithm='mean'" in str(raised.value)


@pytest.mark.proves("9.55")
def test_conflicts_of_backends_are_told_in_one_error() -> None:
    with pytest.raises(ValueError, match="ddpp") as raised:
        fulmen.Trainer(accelerator="cpu", strategy="ddpp", precision="17", logger=False)

    assert "17" in str(raised.value)


def test_settings_and_backends_are_told_in_one_error_too() -> None:
    with pytest.raises(ValueError, match="max_epochs=-5") as raised:
        fulmen.Trainer(accelerator="cpu", max_epochs=-5, strategy="ddpp", logger=False)

    assert "Did you mean 'ddp'?" in str(raised.value)


def test_a_wrong_type_is_a_type_error_too() -> None:
    with pytest.raises(TypeError, match="max_epochs='ten'"):
        fulmen.Trainer(max_epochs="ten", logger=False)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.proves("9.6")
@pytest.mark.parametrize(
    ("given", "seconds"),
    [("00:00:00:30", 30), ("01:02:03:04", 93784), (timedelta(minutes=2), 120), ({"hours": 1}, 3600)],
)
def test_a_duration_may_be_text_a_timedelta_or_its_arguments(given: object, seconds: int) -> None:
    assert parse_duration("max_time", given).total_seconds() == seconds


@pytest.mark.proves("9.5")
def test_max_steps_alone_leaves_epochs_unlimited() -> None:
    trainer = fulmen.Trainer(accelerator="cpu", max_steps=5, min_steps=2, logger=False)

    assert (trainer.max_epochs, trainer.max_steps, trainer.min_epochs) == (-1, 5, 1)
