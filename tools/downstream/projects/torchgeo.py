"""torchgeo: tasks on rasters, with data modules that sample places of a map, and the library's command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

REQUIRES = ["torchgeo==0.8.1"]
PACKAGES = ["torchgeo"]
WHAT = "segmentation of sampled map tiles, classification and regression of images, BYOL, the command line on YAML"
CLASSES = 3

MODULE_OF_THE_COMMAND_LINE = """
import torch
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoDataset


class Images(NonGeoDataset):
    def __init__(self, split: str = "train", size: int = 16) -> None:
        generator = torch.Generator().manual_seed(len(split))
        self.labels = torch.arange(24) % 3
        self.images = torch.rand(24, 3, size, size, generator=generator) + self.labels[:, None, None, None] / 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return {"image": self.images[index], "label": self.labels[index]}


class ImagesModule(NonGeoDataModule):
    mean, std = torch.tensor(0.0), torch.tensor(1.0)

    def __init__(self, batch_size: int = 8, num_workers: int = 0, size: int = 16) -> None:
        super().__init__(Images, batch_size, num_workers, size=size)

    def setup(self, stage: str) -> None:
        self.train_dataset, self.val_dataset = Images("train"), Images("val")
        self.test_dataset = self.predict_dataset = Images("test")
"""

SETTINGS = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: cli, name: run}
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {dirpath: cli, filename: best, monitor: val_loss}
model:
  class_path: ClassificationTask
  init_args: {model: resnet18, num_classes: 3, lr: 0.001}
data:
  class_path: images_module.ImagesModule
  init_args: {batch_size: 8}
"""


def main() -> dict[str, object]:
    """Every part; the maps are written first."""
    return {"maps": maps(), "images": images(), "command line": command_line()}


def options(folder: str, monitor: str, **more: Any) -> dict[str, Any]:
    """What the Trainers below share."""
    from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    return {
        "accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, "log_every_n_steps": 1,
        "logger": CSVLogger(folder, name="log"), "default_root_dir": folder,
        "callbacks": [
            ModelCheckpoint(folder, monitor=monitor, save_top_k=1, save_last=True),
            EarlyStopping(monitor, patience=5), LearningRateMonitor(),
        ], **more,
    }  # fmt: skip


def numbers(metrics: Any) -> dict[str, float]:
    """Metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}


def weights(module: Any) -> list[float]:
    """A sum for each parameter."""
    return [float(weight.detach().double().sum()) for weight in module.parameters()]


def maps() -> dict[str, object]:
    """Semantic segmentation of places sampled from two maps."""
    import lightning.pytorch as pl
    import numpy as np
    import rasterio
    import torch
    from rasterio.transform import from_origin
    from torchgeo.datamodules import GeoDataModule
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import GridGeoSampler, RandomBatchGeoSampler
    from torchgeo.trainers import SemanticSegmentationTask

    random = np.random.default_rng(0)
    truth = random.integers(0, CLASSES, size=(8, 8)).repeat(8, 0).repeat(8, 1).astype("uint8")
    picture = (truth + random.normal(scale=0.3, size=(2, 64, 64))).astype("float32")
    for name, bands in (("picture", picture), ("truth", truth[None])):
        Path(name).mkdir(exist_ok=True)
        with rasterio.open(
            f"{name}/{name}.tif", "w", driver="GTiff", height=64, width=64, count=len(bands), dtype=bands.dtype,
            crs="EPSG:32631", transform=from_origin(0, 64, 1, 1),
        ) as file:  # fmt: skip
            file.write(bands)

    class Picture(RasterDataset):
        filename_glob = "picture.tif"

    class Truth(RasterDataset):
        filename_glob = "truth.tif"
        is_image = False

    class Maps(GeoDataModule):
        mean, std = torch.tensor(0.0), torch.tensor(1.0)

        def __init__(self) -> None:
            super().__init__(Picture, batch_size=4, patch_size=16, length=16, num_workers=0)

        def setup(self, stage: str) -> None:
            self.dataset = Picture("picture") & Truth("truth")
            self.train_batch_sampler = RandomBatchGeoSampler(self.dataset, 16, 4, 16)
            self.sampler = GridGeoSampler(self.dataset, 16, 16)

    pl.seed_everything(1)
    task = SemanticSegmentationTask(
        "fcn", in_channels=2, num_classes=CLASSES, num_filters=4, loss="ce", lr=0.01, patience=1
    )
    trainer = pl.Trainer(**options("maps", "val_loss"))
    trainer.fit(task, datamodule=Maps())
    found: dict[str, object] = {"metrics": numbers(trainer.callback_metrics), "weights": weights(task)}
    found["tested"] = trainer.test(task, datamodule=Maps(), ckpt_path="best", verbose=False)
    best = SemanticSegmentationTask.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    predicted = trainer.predict(best, datamodule=Maps())
    found["predicted"] = [float(batch.double().std()) for batch in predicted]
    return found


def images() -> dict[str, object]:
    """Classification, resumed; regression; self-supervision."""
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader
    from torchgeo.trainers import BYOLTask, ClassificationTask, RegressionTask

    def loader(kind: str, shuffle: bool = False) -> Any:
        generator = torch.Generator().manual_seed(5)
        values = torch.rand(24, 3, 16, 16, generator=generator)
        labels = torch.arange(24) % CLASSES
        target = values.mean((1, 2, 3)) if kind == "regression" else labels
        data = [{"image": each + label / 3, "label": y} for each, label, y in zip(values, labels, target, strict=True)]
        return DataLoader(data, batch_size=8, shuffle=shuffle)  # type: ignore[arg-type]  # torch takes any sequence

    found: dict[str, object] = {}
    pl.seed_everything(2)
    task = ClassificationTask("resnet18", in_channels=3, num_classes=CLASSES, lr=0.001)
    trainer = pl.Trainer(**options("classes", "val_loss"))
    trainer.fit(task, loader("classes"), loader("classes"))
    found["classes"] = [numbers(trainer.callback_metrics), weights(task)[:8]]
    trainer = pl.Trainer(**options("classes-again", "val_loss", max_epochs=3))
    again = ClassificationTask("resnet18", in_channels=3, num_classes=CLASSES, lr=0.001)
    trainer.fit(again, loader("classes"), loader("classes"), ckpt_path="classes/last.ckpt")
    found["resumed"] = [numbers(trainer.callback_metrics), trainer.global_step]
    found["tested"] = trainer.test(again, loader("classes"), verbose=False)
    found["predicted"] = [batch.tolist() for batch in trainer.predict(again, loader("classes"))]

    pl.seed_everything(3)
    number = RegressionTask("resnet18", num_outputs=1, in_channels=3, lr=0.001, freeze_backbone=True)
    trainer = pl.Trainer(**options("numbers", "val_loss", accumulate_grad_batches=2))
    trainer.fit(number, loader("regression", shuffle=True), loader("regression"))
    found["numbers"] = [numbers(trainer.callback_metrics), weights(number)[-2:]]

    pl.seed_everything(4)
    byol = BYOLTask("resnet18", in_channels=3, lr=0.001)
    trainer = pl.Trainer(**options("byol", "train_loss", max_epochs=1, limit_train_batches=2, limit_val_batches=1))
    trainer.fit(byol, loader("classes", shuffle=True), loader("classes"))
    found["byol"] = numbers(trainer.callback_metrics)
    return found


def command_line() -> dict[str, object]:
    """``torchgeo fit`` and ``torchgeo test`` with a YAML file."""
    import sys

    import torch
    from torchgeo.main import main as torchgeo

    Path("images_module.py").write_text(MODULE_OF_THE_COMMAND_LINE, encoding="utf-8")
    Path("settings.yaml").write_text(SETTINGS, encoding="utf-8")
    sys.path.insert(0, os.getcwd())
    torchgeo(["fit", "--config", "settings.yaml"])
    torchgeo(["test", "--config", "settings.yaml", "--ckpt_path", "cli/best.ckpt"])
    saved = torch.load("cli/best.ckpt", weights_only=True)
    files = sorted(str(path) for path in Path("cli").rglob("*") if path.suffix in (".yaml", ".csv", ".ckpt"))
    sums = [float(value.double().sum()) for value in saved["state_dict"].values() if value.is_floating_point()]
    return {"weights": sums, "lr": saved["hyper_parameters"]["lr"], "files": files}
