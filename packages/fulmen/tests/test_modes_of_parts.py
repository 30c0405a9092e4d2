"""Training and evaluation mode of a model's parts, where the module decides itself what evaluation means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen


class Net(fulmen.LightningModule):
    """Its scaler trains during evaluation too, and its frozen part never does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scaler, self.frozen = nn.Linear(2, 1), nn.Identity(), nn.Dropout()
        self.frozen.eval()
        self.seen: list[tuple[str, bool, bool, bool]] = []

    def note(self, stage: str) -> None:
        self.seen.append((stage, self.layer.training, self.scaler.training, self.frozen.training))

    def on_validation_model_eval(self) -> None:
        self.eval()
        self.scaler.train()

    on_test_model_eval = on_predict_model_eval = on_validation_model_eval

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("train")
        return self.layer(self.frozen(batch)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validate")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.note("predict")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*evaluation mode:UserWarning")
def test_each_part_gets_its_mode_back_also_where_the_module_switches_to_evaluation_itself() -> None:
    net, loader = Net(), DataLoader(torch.ones(2, 2), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
    trainer = fulmen.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, loader, loader)
    trainer.test(net, loader, verbose=False)
    trainer.predict(net, loader)
    net.note("after all")

    training, evaluating = (True, True, False), (False, True, False)
    assert net.seen == [
        ("validate", *evaluating), ("train", *training), ("validate", *evaluating), ("train", *training),
        ("validate", *evaluating), ("test", *evaluating), ("predict", *evaluating), ("after all", *training),
    ]  # fmt: skip
