"""What the user set becomes the plan of a fit."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen._planning import make_plan
from fulmen_protocols import MisconfigurationException


def quiet_trainer(**arguments: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


class Counting(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.validated_after: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()  # type: ignore[no-any-return]  # torch says Any of it

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated_after.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("interval", "validated_after"),
    [
        (timedelta(microseconds=1), [1, 2, 3, 4]),
        (timedelta(days=1), []),
    ],
)
def test_a_duration_between_validations_is_counted_from_the_start_of_the_first_fit(
    interval: timedelta, validated_after: list[int]
) -> None:
    module = Counting()
    train, val = DataLoader(torch.ones(4, 2)), DataLoader(torch.ones(1, 2))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    quiet_trainer(val_check_interval=interval).fit(module, train, val)

    assert module.validated_after == validated_after


@pytest.mark.parametrize(
    ("interval", "batches", "expected"),
    [(1.0, 10, math.inf), (0.25, 10, 2), (0.01, 10, 1), (3, 10, 3), (timedelta(seconds=5), 10, math.inf)],
)
def test_validation_is_planned_in_batches_of_the_epoch(interval: Any, batches: float, expected: float) -> None:
    settings = quiet_trainer(val_check_interval=interval).settings

    assert make_plan(settings, batches=batches, validates=True).validate_every_batches == expected


def test_an_interval_longer_than_the_epoch_is_refused_only_where_there_is_something_to_validate() -> None:
    settings = quiet_trainer(val_check_interval=11).settings

    with pytest.raises(MisconfigurationException, match="longer than the epoch of 10 batches"):
        make_plan(settings, batches=10, validates=True)
    assert make_plan(settings, batches=10, validates=False).validate_every_batches == 11


def test_a_fraction_of_an_epoch_of_unknown_length_is_refused() -> None:
    settings = quiet_trainer(val_check_interval=0.5).settings

    with pytest.raises(MisconfigurationException, match="does not know its length"):
        make_plan(settings, batches=math.inf, validates=True)
