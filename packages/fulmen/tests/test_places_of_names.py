"""A program that was written for Lightning finds its names after its import line has changed."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fulmen
import fulmen_fabric
from fulmen.loggers.logger import Logger, rank_zero_experiment
from fulmen_fabric import rank_zero_only

PLACES = [
    ("fulmen.accelerators", "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator find_usable_cuda_devices"),
    ("fulmen.callbacks.callback", "Callback"),
    ("fulmen.callbacks.early_stopping", "EarlyStopping"),
    ("fulmen.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("fulmen.callbacks.progress.rich_progress", "RichProgressBar RichProgressBarTheme"),
    ("fulmen.callbacks.progress.tqdm_progress", "TQDMProgressBar"),
    ("fulmen.core", "LightningDataModule LightningModule"),
    ("fulmen.core.datamodule", "LightningDataModule"),
    ("fulmen.core.module", "LightningModule"),
    ("fulmen.core.optimizer", "LightningOptimizer"),
    ("fulmen.demos.boring_classes", "BoringDataModule BoringModel DemoModel RandomDataset"),
    ("fulmen.loggers.comet", "CometLogger"),
    ("fulmen.loggers.csv_logs", "CSVLogger"),
    ("fulmen.loggers.logger", "DummyLogger Logger merge_dicts rank_zero_experiment"),
    ("fulmen.loggers.mlflow", "MLFlowLogger"),
    ("fulmen.loggers.tensorboard", "TensorBoardLogger"),
    ("fulmen.loggers.wandb", "WandbLogger"),
    ("fulmen.plugins", "CheckpointIO ClusterEnvironment LayerSync MixedPrecision Precision TorchCheckpointIO"),
    ("fulmen.plugins.environments", "ClusterEnvironment LightningEnvironment SLURMEnvironment TorchElasticEnvironment"),
    ("fulmen.plugins.io", "AsyncCheckpointIO CheckpointIO TorchCheckpointIO"),
    ("fulmen.plugins.precision", "DoublePrecision HalfPrecision MixedPrecision Precision"),
    ("fulmen.strategies", "DDPStrategy FSDPStrategy ModelParallelStrategy SingleDeviceStrategy Strategy"),
    ("fulmen.strategies.ddp", "DDPStrategy"),
    ("fulmen.strategies.fsdp", "FSDPStrategy"),
    ("fulmen.strategies.model_parallel", "ModelParallelStrategy"),
    ("fulmen.strategies.single_device", "SingleDeviceStrategy"),
    ("fulmen.strategies.strategy", "Strategy"),
    ("fulmen.trainer", "Trainer"),
    ("fulmen.trainer.states", "RunningStage TrainerFn TrainerState TrainerStatus"),
    ("fulmen.trainer.trainer", "Trainer"),
    ("fulmen.utilities.rank_zero", "rank_zero_info rank_zero_only rank_zero_warn"),
    ("fulmen.utilities.types", "EVAL_DATALOADERS OptimizerLRScheduler STEP_OUTPUT TRAIN_DATALOADERS"),
]


@pytest.mark.parametrize(("place", "names"), PLACES, ids=[place for place, _ in PLACES])
def test_a_name_is_where_lightning_has_it_and_is_one_object_everywhere(place: str, names: str) -> None:
    module = importlib.import_module(place)
    parent, _, last = place.rpartition(".")
    for name in names.split():
        found = getattr(module, name)
        assert name in module.__all__
        shorter = importlib.import_module(parent)
        if name in getattr(shorter, "__all__", ()):
            assert getattr(shorter, name) is found, f"{parent}.{last} has another {name}"


def test_the_packages_of_lightning_are_attributes_too() -> None:
    assert fulmen.pytorch.callbacks.EarlyStopping is fulmen.callbacks.EarlyStopping
    assert fulmen.fabric is fulmen_fabric


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert fulmen.__version__ == version("fulmen")


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        ("strategies", "ParallelStrategy", "write-a-strategy"),
        ("plugins", "FSDPPrecision", "mixed_precision="),
        ("loggers", "NeptuneLogger", r"Trainer\(logger="),
    ],
)
def test_a_name_that_is_not_there_on_purpose_says_so_where_it_is_imported(module: str, name: str, instead: str) -> None:
    with pytest.raises(ImportError, match=rf"fulmen\.{module} has no {name}: .*{instead}"):
        exec(f"from fulmen.{module} import {name}", {})


def test_another_name_is_an_ordinary_slip() -> None:
    for module in ("accelerators", "strategies", "plugins", "loggers"):
        assert not hasattr(importlib.import_module(f"fulmen.{module}"), "Nonsense")


def test_finding_the_trainer_costs_no_torch_until_it_is_named() -> None:
    code = "import sys, fulmen.trainer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Recorder(Logger):
    """As Lightning's documentation shows it."""

    def __init__(self) -> None:
        self.opened = 0
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    @property
    @rank_zero_experiment
    def experiment(self) -> list[str]:
        self.opened += 1
        return ["a run"]


def test_an_experiment_of_ones_own_is_made_on_rank_zero_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Recorder()
    assert logger.experiment == ["a run"]

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with logger.experiment.add_run("x") as anything:
        anything["key"].upload(1)
    assert logger.opened == 1
