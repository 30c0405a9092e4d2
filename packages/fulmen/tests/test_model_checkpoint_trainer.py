"""ModelCheckpoint and EarlyStopping in real fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fulmen.callbacks import EarlyStopping, ModelCheckpoint
from fulmen.module import LightningModule
from fulmen.trainer import Trainer

SCRIPT = [0.5, 0.3, 0.7, 0.2, 0.9, 0.4]


class Scripted(LightningModule):
    """Logs written values: one per training batch (and its mean over the epoch), one per validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.batches = self.validations = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("loss", SCRIPT[self.batches % 6])
        self.log("epoch_loss", SCRIPT[self.batches % 6], on_step=False, on_epoch=True, batch_size=1)
        self.batches += 1
        return self.layer(batch[0]).sum()

    def on_validation_epoch_start(self) -> None:
        self.validations += not self.trainer.sanity_checking

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", SCRIPT[(self.validations - 1) % 6], batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path: Path, callbacks: list[Any], *, ckpt_path: str | None = None, **arguments: Any) -> Trainer:
    loader = DataLoader(TensorDataset(torch.ones(4, 1)))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=str(tmp_path),
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, **arguments},
    )
    trainer.fit(Scripted(), loader, loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*log_every_n_steps.*")
class TestInAFit:
    @pytest.mark.proves("5.23", "5.27")
    def test_the_best_by_validation_is_kept_and_loads_into_the_module(self, tmp_path: Path) -> None:
        callback = ModelCheckpoint(tmp_path / "c", monitor="val_loss", save_last=True)
        fit(tmp_path, [callback])

        assert sorted(os.listdir(tmp_path / "c")) == ["epoch=1-step=8.ckpt", "last.ckpt"]
        assert callback.best_model_score is not None
        assert callback.best_model_score.item() == pytest.approx(0.3)
        content = torch.load(callback.best_model_path, weights_only=True)
        loaded = Scripted.load_from_checkpoint(callback.best_model_path)
        assert torch.equal(loaded.layer.weight, content["state_dict"]["layer.weight"])
        assert content["callbacks"][callback.state_key]["best_model_path"] == callback.best_model_path

    @pytest.mark.proves("5.21")
    @pytest.mark.parametrize(
        ("monitor", "steps"), [("val_loss", [2, 4, 6]), ("loss", [2, 4, 6]), ("epoch_loss", [4, 8, 12])]
    )
    def test_values_are_judged_when_they_are_produced(self, tmp_path: Path, monitor: str, steps: list[int]) -> None:
        callback = ModelCheckpoint(tmp_path / "c", "{step}", monitor, save_top_k=-1)
        if monitor == "epoch_loss":
            with pytest.warns(UserWarning, match="found no such value"):
                fit(tmp_path, [callback], val_check_interval=0.5)
        else:
            fit(tmp_path, [callback], val_check_interval=0.5)

        scores = {
            int(Path(path).stem.removeprefix("step=")): pytest.approx(score.item(), abs=1e-6)
            for path, score in callback.best_k_models.items()
        }
        expected = {
            "val_loss": {2 * (i + 1): SCRIPT[i] for i in range(6)},
            "loss": {2 * (i + 1): SCRIPT[(2 * i + 1) % 6] for i in range(6)},
            "epoch_loss": {4 * (e + 1): sum(SCRIPT[(4 * e + b) % 6] for b in range(4)) / 4 for e in range(3)},
        }
        assert expected[monitor] == scores
        assert list(scores)[:3] == steps

    @pytest.mark.proves("5.25")
    def test_a_resumed_run_prunes_its_own_files_and_spares_the_one_it_came_from(self, tmp_path: Path) -> None:
        first = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=2, mode="max")
        fit(tmp_path, [first], max_epochs=2)
        assert sorted(os.listdir(tmp_path / "c")) == ["step=4.ckpt", "step=8.ckpt"]
        second = ModelCheckpoint(tmp_path / "c", "{step}", monitor="val_loss", save_top_k=2, mode="max")

        # The resumed epochs validate 0.5, 0.3 and 0.7, on top of 0.5 (step 4) and 0.3 (step 8).
        fit(tmp_path, [second], max_epochs=5, ckpt_path=str(tmp_path / "c" / "step=8.ckpt"))

        assert sorted(os.listdir(tmp_path / "c")) == ["step=12.ckpt", "step=20.ckpt", "step=8.ckpt"]

    @pytest.mark.proves("11.6")
    def test_training_ends_when_a_step_value_got_worse_at_two_validations(self, tmp_path: Path) -> None:
        callback = EarlyStopping("loss", patience=1, mode="max")
        trainer = fit(tmp_path, [callback], val_check_interval=0.5, max_epochs=9, enable_checkpointing=False)

        # Batches 2 and 4 log 0.3 and 0.2.
        assert trainer.global_step == 4
        assert callback.best_score.item() == pytest.approx(0.3)
