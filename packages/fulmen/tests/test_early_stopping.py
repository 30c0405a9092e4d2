"""EarlyStopping on a stand-in of the Trainer's public surface."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fulmen.callbacks import EarlyStopping
from fulmen.callbacks.early_stopping import EarlyStoppingReason
from fulmen_protocols import MisconfigurationException


class Strategy:
    """This rank and others that have their own opinion."""

    others_stop = False
    asked = 0

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self.asked += 1
        assert not all
        return decision or self.others_stop


@dataclass
class StandIn:
    callback: Any
    val_check_interval: float | int = 1.0
    check_val_every_n_epoch: int | None = 1
    enable_validation: bool = True
    fast_dev_run: bool = False
    sanity_checking: bool = False
    should_stop: bool = False
    current_epoch: int = 0
    global_step: int = 0
    global_rank: int = 0
    world_size: int = 1
    is_global_zero: bool = True
    callback_metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = SimpleNamespace(fn="fit")
        self.strategy = Strategy()

    def print(self, text: str) -> None:
        self.printed.append(text)

    def fit(self, epochs: list[float | None], name: str = "val_loss") -> int:
        """Epochs with one batch, and a validation where the value is not None; returns how many were run."""
        self.callback.setup(self, None, "fit")
        self.callback.on_train_start(self, None)
        for number, value in enumerate(epochs, start=1):
            self.global_step += 1
            if value is not None:
                self.callback.on_validation_start(self, None)
                self.callback_metrics[name] = torch.tensor(value)
                self.callback.on_validation_end(self, None)
            self.callback.on_train_epoch_end(self, None)
            if self.should_stop:
                return number
            self.current_epoch += 1
        return len(epochs)


@pytest.mark.proves("11.6")
@pytest.mark.parametrize(
    ("values", "patience", "mode", "epochs"),
    [
        ([6.0, 5.0, 5.0, 5.0, 5.0, 5.0], 3, "min", 5),
        ([6.0, 5.0, 4.0, 4.0, 3.0, 3.0], 2, "min", 6),
        ([6.0, 5.0, 6.0, 5.0, 5.0, 5.0], 3, "min", 5),
        ([1.0, 2.0, 2.0, 3.0, 1.0, 1.0], 1, "max", 3),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1, "max", 6),
        ([5.0, 5.0, 5.0], 0, "min", 2),
    ],
)
def test_training_ends_after_as_many_checks_without_improvement_as_patience_allows(
    values: list[float], patience: int, mode: str, epochs: int
) -> None:
    callback = EarlyStopping("val_loss", patience=patience, mode=mode)
    trainer = StandIn(callback)

    assert trainer.fit(list(values)) == epochs
    if trainer.should_stop:
        assert callback.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
        assert callback.stopped_epoch == epochs - 1


@pytest.mark.proves("11.6")
@pytest.mark.parametrize(("mode", "values"), [("min", [1.0, 0.95, 0.9]), ("max", [1.0, 1.05, 1.1])])
def test_an_improvement_smaller_than_min_delta_does_not_count(mode: str, values: list[float]) -> None:
    assert StandIn(EarlyStopping("val_loss", min_delta=0.2, patience=2, mode=mode)).fit(list(values)) == 3
    callback = EarlyStopping("val_loss", min_delta=0.01, patience=2, mode=mode)
    StandIn(callback).fit(list(values))
    assert callback.wait_count == 0


@pytest.mark.proves("11.6")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_ends_training_at_once(value: float) -> None:
    callback = EarlyStopping("val_loss")

    assert StandIn(callback).fit([1.0, value, 1.0]) == 2
    assert callback.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC
    assert "not finite" in str(callback.stopping_reason_message)
    assert StandIn(EarlyStopping("val_loss", check_finite=False, patience=9)).fit([1.0, value, 1.0]) == 3


@pytest.mark.proves("11.6")
@pytest.mark.parametrize(
    ("mode", "arguments", "reason"),
    [
        ("min", {"stopping_threshold": 0.3}, EarlyStoppingReason.STOPPING_THRESHOLD),
        ("max", {"divergence_threshold": 0.3}, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
        ("min", {"divergence_threshold": 0.6}, None),
        ("max", {"stopping_threshold": 0.6}, None),
    ],
)
def test_thresholds_end_training_at_once(
    mode: str, arguments: dict[str, float], reason: EarlyStoppingReason | None
) -> None:
    callback = EarlyStopping("val_loss", mode=mode, patience=9, **arguments)  # type: ignore[arg-type]  # options of many types

    epochs = StandIn(callback).fit([0.5, 0.4, 0.2, 0.1])

    assert epochs == (4 if reason is None else 3)
    assert callback.stopping_reason is (reason or EarlyStoppingReason.NOT_STOPPED)


@pytest.mark.proves("11.6")
def test_epochs_without_a_validation_use_up_no_patience() -> None:
    callback = EarlyStopping("val_loss", patience=2, check_on_train_epoch_end=True)
    trainer = StandIn(callback, check_val_every_n_epoch=3)

    assert trainer.fit([None, None, 1.0, None, None, 1.0, None, None, 1.0, None]) == 9


def test_validations_are_checked_where_there_are_several_in_an_epoch() -> None:
    callback = EarlyStopping("val_loss", patience=1)
    trainer = StandIn(callback, val_check_interval=0.5)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]  # a stand-in
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]  # a stand-in
    for value in (1.0, 2.0):
        trainer.callback_metrics["val_loss"] = torch.tensor(value)
        callback.on_validation_end(trainer, None)  # type: ignore[arg-type]  # a stand-in

    assert trainer.should_stop


def test_a_training_epochs_value_is_checked_at_the_epochs_end_where_validations_are_counted() -> None:
    callback = EarlyStopping("train_loss", patience=1)
    trainer = StandIn(callback, check_val_every_n_epoch=2)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]  # a stand-in
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]  # a stand-in
    waits = []
    for epoch, value in enumerate([1.0, 2.0, 3.0, 4.0]):
        trainer.global_step += 1
        if epoch % 2:
            callback.on_validation_start(trainer, None)  # type: ignore[arg-type]  # a stand-in
            callback.on_validation_end(trainer, None)  # type: ignore[arg-type]  # a stand-in
        trainer.callback_metrics["train_loss"] = torch.tensor(value)
        callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]  # a stand-in
        waits.append((callback.best_score.item(), trainer.should_stop))

    assert waits == [(math.inf, False), (2.0, False), (2.0, False), (2.0, True)]


@pytest.mark.proves("11.6")
def test_one_rank_that_wants_to_stop_stops_all() -> None:
    callback = EarlyStopping("val_loss")
    trainer = StandIn(callback)
    trainer.strategy.others_stop = True

    assert trainer.fit([1.0, 0.5]) == 1


def test_an_unknown_value_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(MisconfigurationException, match="Did you mean 'val_loss'"):
        StandIn(EarlyStopping("val_los")).fit([1.0])


def test_without_strict_an_unknown_value_is_a_warning_and_other_ranks_get_their_answer() -> None:
    trainer = StandIn(EarlyStopping("val_los", strict=False))

    with pytest.warns(UserWarning, match="found no such value"):
        assert trainer.fit([1.0]) == 1
    assert trainer.strategy.asked == 1


@pytest.mark.parametrize("inert", [{"fast_dev_run": True}, {"sanity_checking": True}])
def test_nothing_is_checked_while_trying_out(inert: dict[str, bool]) -> None:
    trainer = StandIn(EarlyStopping("unknown"), **inert)

    assert trainer.fit([math.nan, math.nan]) == 2


@pytest.mark.proves("11.6")
def test_a_resumed_run_goes_on_counting() -> None:
    first = EarlyStopping("val_loss", patience=3)
    StandIn(first).fit([1.0, 1.0, 1.0])
    second = EarlyStopping("val_loss", patience=3)
    second.load_state_dict(first.state_dict())

    assert second.wait_count == 2
    assert second.best_score == torch.tensor(1.0)
    assert StandIn(second).fit([1.0, 1.0]) == 1


def test_its_state_is_lightnings_and_plain() -> None:
    callback = EarlyStopping("val_loss", mode="max")

    assert callback.state_key == "EarlyStopping{'monitor': 'val_loss', 'mode': 'max'}"
    assert callback.state_dict() == {
        "wait_count": 0,
        "stopped_epoch": 0,
        "best_score": torch.tensor(-torch.inf),
        "patience": 3,
        "stopping_reason": 0,
        "stopping_reason_message": None,
    }


def test_it_says_what_it_does_if_asked() -> None:
    trainer = StandIn(EarlyStopping("val_loss", patience=1, verbose=True))
    trainer.fit([1.0, 0.5, 0.75])

    assert trainer.printed == [
        "val_loss improved to 1.",
        "val_loss improved to 0.5, from 1.",
        "val_loss did not improve in 1 checks; its best value was 0.5. Training ends.",
    ]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Did you mean 'max'"):
        EarlyStopping("val_loss", mode="maxi")
