"""When the training loader of the first epoch is iterated, against Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Changing:
    """Batches that a callback exchanges between epochs; an iterator keeps those that it began with."""

    def __init__(self) -> None:
        self.batches = ["first"]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.batches))


def seen_by(package: str, folder: Path) -> list[str]:
    pl = importlib.import_module(package)
    seen: list[str] = []

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]  # a base class found at run time
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def on_train_epoch_start(self) -> None:
            self.trainer.train_dataloader.batches = [f"of epoch {self.trainer.current_epoch}"]

        def training_step(self, batch: str, batch_idx: int) -> Any:
            seen.append(batch)
            return self.layer(torch.ones(1)).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    ).fit(Module(), Changing())  # fmt: skip
    return seen


@pytest.mark.filterwarnings("ignore")
def test_what_the_start_of_an_epoch_changes_in_the_loader_counts_from_the_first_epoch_here(tmp_path: Path) -> None:
    assert seen_by("fulmen", tmp_path) == ["of epoch 0", "of epoch 1"]
    assert seen_by("lightning.pytorch", tmp_path) == ["first", "of epoch 1"]
