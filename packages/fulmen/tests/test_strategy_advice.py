"""What a strategy has learned about its settings while it trained reaches the user once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import fulmen
from fulmen_strategies import SingleDeviceStrategy


class Advising(SingleDeviceStrategy):
    asked: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.asked = []

    def advice(self, placed: nn.Module) -> str | None:
        self.asked.append(type(placed).__name__)
        return "give it another option next time"


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.proves("4.13")
def test_advice_is_asked_for_after_each_fit_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fulmen")
    strategy, data = Advising(), [torch.ones(1, 2)]
    trainer = fulmen.Trainer(barebones=True, max_epochs=1, accelerator="cpu", strategy=strategy)

    trainer.test(Model(), data, verbose=False)
    assert strategy.asked == [], "nothing was trained"
    for _ in range(2):
        trainer.fit(Model(), data)

    assert strategy.asked == ["Model", "Model"]
    assert caplog.messages.count("give it another option next time") == 1
