"""A Trainer with the loggers of services: what a run leaves there. Needs their libraries (``nox -s loggers``)."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen.demos import BoringModel
from fulmen.demos.boring_classes import RandomDataset

if TYPE_CHECKING:
    from pathlib import Path

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


class Module(BoringModel):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(batch)
        self.log("train/loss", loss)
        if batch_idx == 5 and self.hparams["width"] == 13:
            raise RuntimeError("the module's own fault")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))


def run(logger: Any, folder: Path, module: Module) -> fulmen.Trainer:
    torch.manual_seed(0)
    trainer = fulmen.Trainer(
        max_epochs=2,
        logger=logger,
        callbacks=[ModelCheckpoint(dirpath=folder / "kept", monitor="val_loss")],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(RandomDataset(32, 12), batch_size=2)
    trainer.fit(module, loader, loader)
    return trainer


@needs_mlflow
@pytest.mark.proves("6.5", "6.7", "6.8")
def test_a_run_is_in_mlflow_with_its_settings_steps_and_best_checkpoint(tmp_path: Path) -> None:
    from fulmen.loggers import MLFlowLogger

    logger = MLFlowLogger(save_dir=tmp_path / "runs", log_model=True)

    trainer = run(logger, tmp_path, Module())

    found = logger.experiment.get_run(logger.run_id)
    assert found.data.params == {"width": "3"}  # type: ignore[attr-defined]
    assert found.info.status == "FINISHED"  # type: ignore[attr-defined]
    history = logger.experiment.get_metric_history(logger.run_id, "train/loss")  # type: ignore[attr-defined]
    assert [each.step for each in history] == [1, 3, 5, 7, 9, 11]
    [uploaded] = logger.experiment.list_artifacts(logger.run_id)  # type: ignore[attr-defined]
    assert trainer.checkpoint_callback.best_model_path.endswith(f"{uploaded.path}.ckpt")


@needs_mlflow
@pytest.mark.proves("6.8")
def test_a_run_that_fails_is_failed_in_mlflow(tmp_path: Path) -> None:
    from fulmen.loggers import MLFlowLogger

    logger = MLFlowLogger(save_dir=tmp_path / "runs")

    with pytest.raises(RuntimeError, match="own fault"):
        run(logger, tmp_path, Module(width=13))

    assert logger.experiment.get_run(logger.run_id).info.status == "FAILED"  # type: ignore[attr-defined]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.proves("6.4")
def test_checkpoints_are_filed_under_the_project_and_id_of_a_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    from fulmen.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="mine")
    trainer = fulmen.Trainer(
        max_epochs=1, logger=logger, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0
    )

    trainer.fit(Module(), DataLoader(RandomDataset(32, 12), batch_size=2))

    [kept] = (tmp_path / "mine" / logger.version / "checkpoints").iterdir()
    assert kept.name == "epoch=0-step=6.ckpt"
    assert trainer.log_dir == str(tmp_path)
    wandb.finish()
