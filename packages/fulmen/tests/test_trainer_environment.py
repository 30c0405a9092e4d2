"""Arguments of the Trainer that nobody passes come from environment variables."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import fulmen

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.mark.proves("9.1", "A.9")
@pytest.mark.parametrize("prefix", ["PL_TRAINER_", "FULMEN_TRAINER_"])
@pytest.mark.parametrize(
    ("argument", "text", "value"),
    [
        ("max_epochs", "3", 3),
        ("limit_train_batches", "0.5", 0.5),
        ("limit_val_batches", "1", 1),
        ("val_check_interval", "None", 1.0),
        ("check_val_every_n_epoch", "None", None),
        ("default_root_dir", "s3://bucket/runs", "s3://bucket/runs"),
        ("overfit_batches", " 2 ".strip(), 2),
    ],
)
def test_a_value_is_read_as_a_literal_or_else_as_text(
    prefix: str, argument: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(prefix + argument.upper(), text)
    trainer = fulmen.Trainer(**{"max_epochs": 1, **QUIET} if argument != "max_epochs" else QUIET)

    found = getattr(trainer, argument)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.proves("9.1", "A.9")
def test_every_argument_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "ACCELERATOR": "cpu",
        "DEVICES": "1",
        "PRECISION": "bf16-mixed",
        "LOGGER": "False",
        "ENABLE_CHECKPOINTING": "False",
        "ENABLE_PROGRESS_BAR": "False",
        "ENABLE_MODEL_SUMMARY": "False",
        "MAX_STEPS": "7",
        "MAX_TIME": "00:00:00:30",
    }.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    trainer = fulmen.Trainer()

    assert (trainer.precision, trainer.max_steps, trainer.loggers, trainer.num_devices) == ("bf16-mixed", 7, [], 1)
    assert trainer.settings.max_time is not None
    assert trainer.checkpoint_callback is trainer.progress_bar_callback is None


@pytest.mark.proves("9.1")
def test_what_is_passed_wins_and_our_prefix_goes_before_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "3")
    monkeypatch.setenv("FULMEN_TRAINER_MAX_EPOCHS", "4")

    assert fulmen.Trainer(**QUIET).max_epochs == 4
    assert fulmen.Trainer(max_epochs=5, **QUIET).max_epochs == 5  # type: ignore[arg-type]  # options of many types


@pytest.mark.proves("9.1")
@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("PL_TRAINER_MAX_EPOCHS", "ten", "max_epochs='ten' must be a whole number"),
        ("FULMEN_TRAINER_ACCUMULATE_GRAD_BATCHES", "0", "accumulate_grad_batches=0 must be at least 1"),
        ("PL_TRAINER_BAREBONES", "maybe", "barebones='maybe' must be True or False"),
        ("PL_TRAINER_STRATEGY", "ddpp", "Did you mean 'ddp'?"),
    ],
)
def test_a_wrong_value_is_blamed_on_its_variable(
    variable: str, text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises((ValueError, LookupError)) as raised:
        fulmen.Trainer(**QUIET)

    assert says in str(raised.value)
    assert f"from {variable}={text!r}. Change or unset them" in str(raised.value)


@pytest.mark.proves("9.1")
def test_a_misspelt_variable_is_told_with_the_closest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCH", "3")
    with pytest.warns(UserWarning, match="PL_TRAINER_MAX_EPOCH is set.*Did you mean 'PL_TRAINER_MAX_EPOCHS'"):
        fulmen.Trainer(max_epochs=1, **QUIET)  # type: ignore[arg-type]  # options of many types


@pytest.mark.proves("9.1")
def test_arguments_are_keyword_only_and_can_be_inspected() -> None:
    with pytest.raises(TypeError):
        fulmen.Trainer("cpu")  # type: ignore[misc]  # wrong on purpose

    parameters = inspect.signature(fulmen.Trainer).parameters
    assert {"accelerator", "max_epochs", "val_check_interval"} <= set(parameters)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())


@pytest.mark.proves("9.1")
def test_a_subclass_gets_the_defaults_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "3")

    class Own(fulmen.Trainer):
        def __init__(self, *, note: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.note = note

    trainer = Own(note="mine", **QUIET)

    assert (trainer.note, trainer.max_epochs) == ("mine", 3)
