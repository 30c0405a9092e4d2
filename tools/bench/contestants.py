"""Who is measured: the raw loop, and whatever has the Trainer's or Fabric's interface under the name that is imported.

A contestant's ``run(config, batches, tick)`` does ``batches`` steps of the same work; each forward calls ``tick``.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from tools.bench.workload import TinyMLP, loader

LEARNING_RATE = 0.01
LOG_EVERY = 50

Tick = Callable[[], None]


class Contestant(Protocol):
    """One way of doing the same steps."""

    configs: tuple[str, ...]

    def run(self, config: str, batches: int, tick: Tick, distinct: int | None = None) -> None:
        """Do the steps."""
        ...


class Raw:
    """The loop that a person writes without any framework."""

    configs = ("bare", "log", "val", "predict")

    def run(self, config: str, batches: int, tick: Tick, distinct: int | None = None) -> None:
        """Train, validate or predict."""
        model = TinyMLP(tick)
        data = loader(batches, distinct)
        if config in ("val", "predict"):
            model.eval()
            with torch.inference_mode():
                outputs = []
                for x, y in data:
                    output = model(x)
                    if config == "val":
                        F.cross_entropy(output, y)
                    else:
                        outputs.append(output)
            return
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        if config == "log":
            self._train_and_log(model, optimizer, data)
            return
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    def _train_and_log(self, model: TinyMLP, optimizer: torch.optim.Optimizer, data: Any) -> None:
        with tempfile.NamedTemporaryFile("w", newline="") as file:
            writer = csv.writer(file)
            for step, (x, y) in enumerate(data, 1):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                if step % LOG_EVERY == 0:
                    writer.writerow([step, loss.item()])
                    file.flush()


class TrainerLike:
    """fulmen's Trainer, and every other with its interface."""

    configs = (
        *("bare", "log", "default", "val", "predict", "metrics10"),
        *("bare+idle10", "log+idle10", "default+idle10", "val+idle10", "predict+idle10", "bare+idle50"),
    )

    def __init__(self, name: str) -> None:
        self.package: Any = importlib.import_module(name)
        logging.getLogger(name).setLevel(logging.ERROR)
        package = self.package

        class Module(package.LightningModule):  # type: ignore[misc, name-defined]  # the base class is chosen at run time
            def __init__(self, tick: Tick, logged: int) -> None:
                super().__init__()
                self.net = TinyMLP(tick)
                self.names = [f"loss{index}" for index in range(logged)]

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                x, y = batch
                loss = F.cross_entropy(self.net(x), y)
                for name in self.names:
                    self.log(name, loss)
                return loss

            def validation_step(self, batch: Any, batch_idx: int) -> Any:
                x, y = batch
                return F.cross_entropy(self.net(x), y)

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                return self.net(batch[0])

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

        self.module = Module

    def run(self, config: str, batches: int, tick: Tick, distinct: int | None = None) -> None:
        """Train (in the given configuration), validate or predict; ``+idle10`` adds ten callbacks without a hook."""
        data = loader(batches, distinct)
        config, _, idle = config.partition("+idle")
        logged = {"log": 1, "default": 1, "metrics10": 10}.get(config, 0)
        module = self.module(tick, logged)
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [self.package.Callback() for _ in range(int(idle or 0))]
            trainer = self.package.Trainer(callbacks=callbacks, **self._settings(config, folder))
            if config == "val":
                trainer.validate(module, data, verbose=False)
            elif config == "predict":
                trainer.predict(module, data)
            else:
                trainer.fit(module, data)

    def _csv_logger(self, folder: str) -> Any:
        return importlib.import_module(f"{self.package.__name__}.loggers").CSVLogger(folder)

    def _settings(self, config: str, folder: str) -> dict[str, Any]:
        if config == "default":  # as a user gets it: progress bar, checkpoint, logger
            return {"max_epochs": 1, "default_root_dir": folder, "accelerator": "cpu", "devices": 1}
        settings: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": folder,
        }
        if config in ("log", "metrics10"):
            settings |= {"logger": self._csv_logger(folder), "log_every_n_steps": LOG_EVERY}
        return settings


class FabricLike:
    """fulmen's Fabric, and every other with its interface: the raw loop, with the engineering lent."""

    configs = ("bare", "val")

    def __init__(self, name: str) -> None:
        self.fabric_class: Any = importlib.import_module(name).Fabric

    def run(self, config: str, batches: int, tick: Tick, distinct: int | None = None) -> None:
        """Train or validate in a loop of the user's own."""
        fabric = self.fabric_class(accelerator="cpu", devices=1)
        fabric.launch()
        network = TinyMLP(tick)
        model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=LEARNING_RATE))
        data = fabric.setup_dataloaders(loader(batches, distinct))
        if config == "val":
            model.eval()
            with torch.inference_mode():
                for x, y in data:
                    F.cross_entropy(model(x), y)
            return
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()


NAMES = {
    "raw": ("torch", lambda: Raw()),
    "fulmen": ("fulmen", lambda: TrainerLike("fulmen")),
    "fulmen-fabric": ("fulmen", lambda: FabricLike("fulmen")),
    "lightning": ("lightning", lambda: TrainerLike("lightning.pytorch")),
    "lightning-fabric": ("lightning", lambda: FabricLike("lightning.fabric")),
}


def importable(name: str) -> bool:
    """Whether the library of a contestant is installed here."""
    return importlib.util.find_spec(NAMES[name][0]) is not None


def contestant(name: str) -> Contestant:
    """Import and prepare a contestant; torch works on one thread from here on."""
    warnings.filterwarnings("ignore")  # what a peer deprecates is not measured
    torch.set_num_threads(1)
    return NAMES[name][1]()
