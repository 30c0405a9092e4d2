"""A run that was begun in Lightning goes on here, and the other way round, with the same state and the same outcome."""

from __future__ import annotations

import importlib
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen

lightning = pytest.importorskip("lightning.pytorch")

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")
FRAMEWORKS = {"lightning": lightning, "fulmen": fulmen}
PAIRS = list(product(FRAMEWORKS, FRAMEWORKS))


def data(seed: int, size: int) -> DataLoader[Any]:
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def train(framework: str, root: Path, epochs: int, ckpt_path: Path | None = None) -> tuple[dict[str, Any], list[Any]]:
    """What callbacks find when training starts, and the weights in the end."""
    pl: Any = FRAMEWORKS[framework]
    callbacks = importlib.import_module(f"{pl.__name__}.callbacks")
    found: dict[str, Any] = {}

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    class Reads(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.update(
                epoch=(trainer.current_epoch, pl_module.current_epoch),
                step=trainer.global_step,
                batches=trainer.fit_loop.total_batch_idx,
                lr=trainer.optimizers[0].param_groups[0]["lr"],
                adams_steps=[float(entry["step"]) for entry in trainer.optimizers[0].state.values()],
                best=pytest.approx(float(stopping.best_score)),
                wait=stopping.wait_count,
                kept={path.name for path in (root / "kept").glob("*")},
                best_path=saving.best_model_path,
                best_k={path: pytest.approx(float(value)) for path, value in saving.best_k_models.items()},
            )

    stopping = callbacks.EarlyStopping("val", patience=50)
    saving = callbacks.ModelCheckpoint(root / "kept", monitor="val", save_top_k=2, save_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[stopping, saving, Reads()],
        default_root_dir=root, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Net()
    trainer.fit(model, data(0, 32), data(1, 16), ckpt_path=ckpt_path)
    return found, [value.tolist() for value in model.state_dict().values()]


@pytest.mark.proves("5.4", "5.9")
def test_a_run_goes_on_in_the_other_framework_as_in_its_own(tmp_path: Path) -> None:
    outcomes = {}
    for first, second in PAIRS:
        root = tmp_path / "run"  # callbacks keep paths, so every pair has the same folder
        train(first, root, 2)
        outcomes[first, second] = train(second, root, 4, root / "kept" / "last.ckpt")
        root.rename(tmp_path / f"{first}-{second}")

    expected = outcomes["lightning", "lightning"]
    assert expected[0]["epoch"] == (2, 2)
    assert len(expected[0]["best_k"]) == 2
    for pair in PAIRS:
        assert outcomes[pair] == expected, pair
    _, whole = train("fulmen", tmp_path / "whole", 4)
    assert expected[1] == whole
