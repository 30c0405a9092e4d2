"""Runs small trainings under a package with Lightning's names and prints what came out, as JSON.

``python scenario_runner.py LIBRARY`` is started once for fulmen and once for Lightning; the two outputs are compared.
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable


def dataset(samples: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def base(library: Any) -> type:
    class Model(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def loss(self, batch: Any) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).argmax(1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Model


OWN_TRAINING_LOADERS = ("several_training_loaders",)
SCENARIOS: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {}


def scenario(function: Callable[[Any], tuple[Any, dict[str, Any]]]) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def plain(library: Any) -> Any:
    return base(library)(), {}


@scenario
def a_row_every_step(library: Any) -> Any:
    return base(library)(), {"log_every_n_steps": 1}


@scenario
def accumulation(library: Any) -> Any:
    return base(library)(), {"accumulate_grad_batches": 3, "log_every_n_steps": 1}


@scenario
def clipping_by_value(library: Any) -> Any:
    return base(library)(), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


@scenario
def forked_names(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("both", loss, on_step=True, on_epoch=True)
            self.log("epoch_only", loss, on_step=False, on_epoch=True)
            self.log("summed", loss, on_step=False, on_epoch=True, reduce_fx="sum")
            self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
            self.log("number", float(batch_idx), on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_both", self.loss(batch), on_step=True, on_epoch=True)

    return Model(), {"log_every_n_steps": 2}


@scenario
def logging_from_hooks(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("from_batch_end", outputs["loss"])

        def on_train_epoch_start(self) -> None:
            self.log("epoch_start", 1.5)

        def on_train_epoch_end(self) -> None:
            self.log("epoch_end", 2.5)

        def on_validation_epoch_end(self) -> None:
            self.log("val_epoch_end", 3.5)

    return Model(), {"log_every_n_steps": 2}


@scenario
def validation_by_interval(library: Any) -> Any:
    return base(library)(), {"val_check_interval": 2, "log_every_n_steps": 1}


@scenario
def validation_by_fraction(library: Any) -> Any:
    return base(library)(), {"val_check_interval": 0.5, "log_every_n_steps": 3}


@scenario
def validation_across_epochs(library: Any) -> Any:
    return base(library)(), {"val_check_interval": 5, "check_val_every_n_epoch": None}


@scenario
def several_validation_loaders(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch))
            if dataloader_idx == 1:
                self.log("second", self.loss(batch), add_dataloader_idx=False)

        def val_dataloader(self) -> Any:
            return [DataLoader(dataset(9, 2), batch_size=4), DataLoader(dataset(6, 3), batch_size=4)]

    return Model(), {}


@scenario
def schedulers_by_step_and_metric(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            step = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
            return [optimizer], [
                {"scheduler": step, "interval": "step"},
                {"scheduler": plateau, "monitor": "val_loss"},
            ]

    return Model(), {"accumulate_grad_batches": 2}


@scenario
def skipped_epoch(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 3 else None

    return Model(), {"log_every_n_steps": 1}


@scenario
def stopped_by_a_callback(library: Any) -> Any:
    class Stop(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                trainer.should_stop = True

    return base(library)(), {"callbacks": [Stop()], "log_every_n_steps": 1}


@scenario
def minimum_epochs_before_a_stop(library: Any) -> Any:
    class Stop(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    return base(library)(), {"callbacks": [Stop()], "min_epochs": 2, "max_epochs": 4}


@scenario
def max_steps_inside_an_epoch(library: Any) -> Any:
    return base(library)(), {"max_steps": 8, "max_epochs": -1, "log_every_n_steps": 1}


@scenario
def limits_as_fractions(library: Any) -> Any:
    return base(library)(), {"limit_train_batches": 0.5, "limit_val_batches": 0.7, "log_every_n_steps": 1}


@scenario
def fast_dev_run(library: Any) -> Any:
    return base(library)(), {"fast_dev_run": 2}


@scenario
def manual_with_two_optimizers(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            for optimizer in (first, second):
                self.toggle_optimizer(optimizer)
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            self.log("train_loss", loss)

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.net[0].parameters(), lr=0.1),
                torch.optim.Adam(self.net[2].parameters(), lr=0.01),
            ]

    return Model(), {"log_every_n_steps": 1}


@scenario
def early_stopping(library: Any) -> Any:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    stop = callbacks.EarlyStopping("val_loss", mode="max", patience=1)
    return base(library)(), {"callbacks": [stop], "max_epochs": 8}


@scenario
def best_checkpoints(library: Any) -> Any:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    keep = callbacks.ModelCheckpoint(
        monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}-{val_loss:.3f}"
    )
    return base(library)(), {"callbacks": [keep], "max_epochs": 4, "enable_checkpointing": True}


@scenario
def checkpoints_every_few_steps(library: Any) -> Any:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    keep = callbacks.ModelCheckpoint(every_n_train_steps=4, save_top_k=-1)
    return base(library)(), {"callbacks": [keep], "enable_checkpointing": True}


@scenario
def learning_rates(library: Any) -> Any:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")

    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    return Model(), {"callbacks": [callbacks.LearningRateMonitor()], "log_every_n_steps": 2}


@scenario
def clipping_by_norm(library: Any) -> Any:
    return base(library)(), {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "log_every_n_steps": 1}


@scenario
def adam_with_a_longer_accumulation_than_an_epoch(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Model(), {"accumulate_grad_batches": 10, "log_every_n_steps": 1}


@scenario
def lbfgs(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    return Model(), {"log_every_n_steps": 1}


@scenario
def batches_without_a_loss(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == 1 else loss

    return Model(), {"log_every_n_steps": 1}


@scenario
def a_mapping_with_extra_outputs(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "size": len(batch[1])}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("size", float(outputs["size"]), on_epoch=True, on_step=False, reduce_fx="sum")
            self.log("scaled", outputs["loss"])

    return Model(), {"accumulate_grad_batches": 3, "log_every_n_steps": 1}


@scenario
def an_own_optimizer_step_with_warm_up(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
            optimizer.step(closure=optimizer_closure)
            self.log("lr", optimizer.param_groups[0]["lr"])

    return Model(), {"log_every_n_steps": 1}


@scenario
def an_own_backward_and_zero_grad(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def backward(self, loss: Any) -> None:
            (2 * loss).backward()

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    return Model(), {"log_every_n_steps": 2}


@scenario
def gradient_norms_before_the_step(library: Any) -> Any:
    grads = importlib.import_module(f"{library.__name__}.utilities")

    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(grads.grad_norm(self, norm_type=2))

    return Model(), {"log_every_n_steps": 1}


@scenario
def one_cycle_by_step(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    monitor = callbacks.LearningRateMonitor("step", log_momentum=True)
    return Model(), {"callbacks": [monitor], "accumulate_grad_batches": 2, "log_every_n_steps": 1}


@scenario
def schedule_with_a_frequency(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": decay, "interval": "step", "frequency": 3, "name": "rate"},
            }

    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    return Model(), {"callbacks": [callbacks.LearningRateMonitor()], "log_every_n_steps": 1}


@scenario
def manual_with_accumulation_and_a_schedule(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            loss = self.loss(batch)
            self.manual_backward(loss / 2)
            if (batch_idx + 1) % 2 == 0:
                self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]

    return Model(), {"log_every_n_steps": 1}


@scenario
def validation_every_second_epoch(library: Any) -> Any:
    return base(library)(), {"check_val_every_n_epoch": 2, "max_epochs": 5, "log_every_n_steps": 4}


@scenario
def without_validation_batches(library: Any) -> Any:
    return base(library)(), {"limit_val_batches": 0, "log_every_n_steps": 1}


@scenario
def limits_as_numbers_and_no_sanity_check(library: Any) -> Any:
    options = {"limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 1, "limit_predict_batches": 2}
    return base(library)(), {**options, "num_sanity_val_steps": 0, "log_every_n_steps": 1}


@scenario
def overfitting_a_few_batches(library: Any) -> Any:
    return base(library)(), {"overfit_batches": 2, "max_epochs": 3, "log_every_n_steps": 1}


@scenario
def steps_and_epochs_as_limits(library: Any) -> Any:
    return base(library)(), {"max_steps": 9, "max_epochs": 5, "min_steps": 3, "log_every_n_steps": 2}


@scenario
def double_precision(library: Any) -> Any:
    return base(library)(), {"precision": "64-true", "log_every_n_steps": 1}


@scenario
def dropout_and_batch_norm(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))

    return Model(), {"log_every_n_steps": 1}


@scenario
def metric_objects(library: Any) -> Any:
    import torchmetrics

    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
            self.val_accuracy = self.accuracy.clone()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.accuracy(self.net(batch[0]), batch[1])
            self.log("train_acc", self.accuracy, on_step=True, on_epoch=True)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_accuracy.update(self.net(batch[0]), batch[1])
            self.log("val_acc", self.val_accuracy)

    return Model(), {"log_every_n_steps": 2}


@scenario
def a_callback_that_logs_and_one_with_state(library: Any) -> Any:
    class Count(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            self.batches = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.batches += 1
            pl_module.log("seen", float(self.batches))

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("seen_at_validation", float(self.batches))

        def state_dict(self) -> dict[str, int]:
            return {"batches": self.batches}

    return base(library)(), {"callbacks": [Count()], "enable_checkpointing": True, "log_every_n_steps": 3}


@scenario
def several_training_loaders(library: Any) -> Any:
    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch["a"]) + self.loss(batch["b"])
            self.log("train_loss", loss, batch_size=4)
            return loss

        def train_dataloader(self) -> Any:
            return {"a": DataLoader(dataset(12, 7), batch_size=4), "b": DataLoader(dataset(20, 8), batch_size=4)}

    return Model(), {"log_every_n_steps": 1}


@scenario
def early_stopping_with_a_threshold_by_training_loss(library: Any) -> Any:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")

    class Model(base(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    stop = callbacks.EarlyStopping("train_loss", stopping_threshold=1.05, check_on_train_epoch_end=True)
    return Model(), {"callbacks": [stop], "max_epochs": 12, "limit_val_batches": 0}


def rows(folder: Path) -> list[dict[str, float]]:
    """The logged rows, numbers rounded as far as two libraries may differ in the order of additions."""
    found = sorted(folder.rglob("metrics.csv"))
    if not found:
        return []
    with found[0].open() as file:
        return [{k: round(float(v), 5) for k, v in sorted(row.items()) if v} for row in csv.DictReader(file)]


def run(library_name: str, name: str) -> dict[str, Any]:
    """What one scenario leaves behind."""
    library = importlib.import_module(library_name)
    loggers = importlib.import_module(f"{library_name}.loggers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, options = SCENARIOS[name](library)
        options = {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": loggers.CSVLogger(temporary),
            "default_root_dir": temporary,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **options,
        }
        trainer = library.Trainer(**options)
        torch.manual_seed(3)
        train = DataLoader(dataset(26), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(4))
        val = None if name == "several_validation_loaders" else DataLoader(dataset(11, 2), batch_size=4)
        if name in OWN_TRAINING_LOADERS:
            trainer.fit(model, val_dataloaders=val)
        else:
            trainer.fit(model, train, val)
        result: dict[str, Any] = {
            "global_step": trainer.global_step,
            "current_epoch": trainer.current_epoch,
            "callback_metrics": {k: round(float(v), 5) for k, v in sorted(trainer.callback_metrics.items())},
            "weights": [round(float(p.double().sum()), 5) for p in model.parameters()],
            "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*.ckpt")),
            "best": str(getattr(trainer.checkpoint_callback, "best_model_path", "")).removeprefix(temporary),
        }
        for logger in trainer.loggers:
            logger.save()
        result["rows"] = rows(folder)
        result["test"] = [
            {k: round(v, 5) for k, v in d.items()}
            for d in trainer.test(model, DataLoader(dataset(7, 5), batch_size=3), verbose=False)
        ]
        predictions = trainer.predict(model, DataLoader(dataset(5, 6), batch_size=2))
        result["predictions"] = [p.tolist() for p in predictions]
        return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    wanted = sys.argv[2:] or list(SCENARIOS)
    print("RESULT" + json.dumps({name: run(sys.argv[1], name) for name in wanted}))
