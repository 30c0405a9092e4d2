"""Logs from everywhere, in every way, under a package with Lightning's names, and prints what came of it as JSON.

``python logging_runner.py LIBRARY WHAT`` is started once for fulmen and once for Lightning; the outputs are compared.
WHAT is ``places`` (from which hook of whom ``self.log`` may be called, and what it records there) or ``views`` (the
three views of the metrics, read inside every hook of a run).
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
from hook_recorder import CALLBACK_HOOKS, MODULE_HOOKS
from torch import nn
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Callable

# Not hooks that a run calls with a module attached and something to log.
NOT_CALLED = {"configure_callbacks", "on_exception", "state_dict", "load_state_dict"}
OPTIONS: dict[str, dict[str, bool]] = {
    "default": {},
    "both": {"on_step": True, "on_epoch": True},
    "step": {"on_step": True, "on_epoch": False},
    "neither": {"on_step": False, "on_epoch": False},
}


def data(batches: int = 2, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(torch.randn(2 * batches, 4, generator=torch.Generator().manual_seed(seed)), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def rows(folder: str) -> list[dict[str, float]]:
    found = sorted(Path(folder).rglob("metrics.csv"))
    if not found:
        return []
    with found[-1].open() as file:
        return [{k: round(float(v), 5) for k, v in sorted(row.items()) if v} for row in csv.DictReader(file)]


def module_class(library: Any) -> type:
    class Module(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        train_dataloader = val_dataloader = test_dataloader = predict_dataloader = lambda self: data()

    return Module


def trainer_of(library: Any, folder: str, **options: Any) -> Any:
    loggers = importlib.import_module(f"{library.__name__}.loggers")
    return library.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": loggers.CSVLogger(folder),
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **options,
        }
    )


def plain(metrics: Any) -> dict[str, float]:
    return {name: round(float(value), 5) for name, value in sorted(metrics.items())}


# ---------------------------------------------------------------------- places


def logging_in(base: type, hook: str, options: dict[str, bool]) -> type:
    """A subclass of ``base`` that logs each time ``hook`` is called."""
    original = getattr(base, hook)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        self.log("x", 1.5, **options)
        return result

    method.__name__ = hook
    return type(base.__name__, (base,), {hook: method})


def stage_of(hook: str) -> str:
    return "test" if "test" in hook else "predict" if "predict" in hook else "fit"


def one_place(library: Any, owner: str, hook: str, options: dict[str, bool]) -> Any:
    base = module_class(library)
    callbacks = []
    if owner == "module":
        module = logging_in(base, hook, options)()
    else:
        module = base()
        callbacks = [logging_in(library.Callback, hook, options)()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(library, folder, callbacks=callbacks, gradient_clip_val=1.0)
        results: Any = None
        try:
            if "checkpoint" in hook:
                other = trainer_of(library, folder)
                other.fit(base())
                other.save_checkpoint(f"{folder}/here.ckpt")
                if hook == "on_load_checkpoint":
                    trainer.fit(module, ckpt_path=f"{folder}/here.ckpt")
                else:
                    trainer.fit(module)
                    trainer.save_checkpoint(f"{folder}/there.ckpt")
            else:
                results = getattr(trainer, stage_of(hook))(module)
        except Exception as error:  # noqa: BLE001  the kind of error is what is compared
            return type(error).__name__
        for logger in trainer.loggers:
            logger.save()
        return {
            "callback_metrics": plain(trainer.callback_metrics),
            "logged_metrics": plain(trainer.logged_metrics),
            "results": results if stage_of(hook) == "test" else None,
            "rows": rows(folder),
        }


def places(library: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for owner, hooks in (("module", MODULE_HOOKS), ("callback", CALLBACK_HOOKS)):
        for hook in hooks:
            if hook in NOT_CALLED:
                continue
            for kind, options in OPTIONS.items():
                if kind != "default" and isinstance(found[f"{owner}.{hook}.default"], str):
                    continue  # it may not log at all
                found[f"{owner}.{hook}.{kind}"] = one_place(library, owner, hook, options)
    return found


# ---------------------------------------------------------------------- views

SCENARIOS: dict[str, Callable[[Any], Any]] = {}


def scenario(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SCENARIOS[function.__name__] = function
    return function


def steps(library: Any, **hooks: Callable[..., Any]) -> type:
    """A module class with ``hooks``; ``train`` and ``evaluate`` are called in its steps before they return."""
    train, evaluate = hooks.pop("train", None), hooks.pop("evaluate", None)
    base = module_class(library)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).square().mean()
        if train is not None:
            train(self, batch, batch_idx, loss)
        return loss

    def evaluation_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if evaluate is not None:
            evaluate(self, batch, batch_idx, self.layer(batch).square().mean())

    methods = {"training_step": training_step, "validation_step": evaluation_step, "test_step": evaluation_step}
    return type("Module", (base,), {**methods, **hooks})


def ways(prefix: str) -> Callable[..., None]:
    """Every combination of on_step and on_epoch with every reduction, shown in the bar or not."""

    def log(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        for on_step in (None, True, False):
            for on_epoch in (None, True, False):
                if on_step is on_epoch is False or (on_epoch is False and prefix == "v" and not on_step):
                    continue  # that would record nothing
                if on_step is False and on_epoch is None and prefix == "t":
                    continue
                for reduce_fx in ("mean", "sum", "min", "max"):
                    name = f"{prefix}/{on_step}/{on_epoch}/{reduce_fx}"
                    value = loss.detach() + batch_idx
                    self.log(name, value, on_step=on_step, on_epoch=on_epoch, reduce_fx=reduce_fx, prog_bar=True)

    return log


@scenario
def every_way_in_training(library: Any) -> Any:
    return steps(library, train=ways("t"))(), {}


@scenario
def every_way_in_validation(library: Any) -> Any:
    return steps(library, evaluate=ways("v"))(), {}


@scenario
def numbers_and_ragged_batches(library: Any) -> Any:
    def log(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        self.log("number", batch_idx, on_epoch=True)
        self.log("true", batch_idx == 1, on_epoch=True)
        self.log("mine", float(batch_idx), on_epoch=True, batch_size=1 + 3 * batch_idx)
        self.log("sized", loss, on_epoch=True)
        self.log("one_element", loss.reshape(1, 1), on_step=False, on_epoch=True)
        self.log("hidden", loss, logger=False, prog_bar=True, on_epoch=True)

    model = steps(library, train=log, evaluate=log)()
    ragged = lambda: DataLoader(torch.randn(7, 4, generator=torch.Generator().manual_seed(3)), batch_size=3)  # noqa: E731
    model.train_dataloader = model.val_dataloader = model.test_dataloader = ragged
    return model, {"max_epochs": 2}


@scenario
def several_loaders(library: Any) -> Any:
    def log(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("epoch", loss, on_step=False, on_epoch=True)

    def at_end(self: Any) -> None:
        self.log("at_end", 2.5, prog_bar=True)

    hooks = {"on_validation_epoch_end": at_end, "on_test_epoch_end": at_end}
    model = steps(library, evaluate=log, **hooks)()
    model.val_dataloader = model.test_dataloader = lambda: [data(2, 1), data(3, 2)]
    return model, {"max_epochs": 2}


@scenario
def shared_names_over_loaders(library: Any) -> Any:
    def step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log(f"loss_{dataloader_idx}", self.layer(batch).mean(), add_dataloader_idx=False)

    model = steps(library)()
    type(model).validation_step = type(model).test_step = step
    model.val_dataloader = model.test_dataloader = lambda: [data(2, 1), data(3, 2)]
    return model, {}


@scenario
def callbacks_log(library: Any) -> Any:
    class Logs(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.log("batch_start", float(batch_idx))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("batch_end", outputs["loss"], on_epoch=True)
            self.log_dict({"a": batch_idx + 1.0, "b": batch_idx + 2.0}, on_epoch=True, prog_bar=True)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log("train_end", 3.0)

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            self.log("val_batch_end", 4.0)

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log_dict({"c": 5.0, "d": 6.0})

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.log("before_step", 7.0, on_epoch=True)

    return steps(library, train=lambda self, b, i, loss: self.log("loss", loss))(), {
        "callbacks": [Logs()],
        "max_epochs": 2,
    }


@scenario
def the_same_name_from_two_hooks(library: Any) -> Any:
    def at_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("x", 100.0 + batch_idx)

    def epoch_end(self: Any) -> None:
        self.log("e", 50.0)

    def train(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        self.log("x", float(batch_idx))
        self.log("e", float(batch_idx), on_step=False, on_epoch=True)

    hooks = {"on_train_batch_end": at_end, "on_train_epoch_end": epoch_end}
    return steps(library, train=train, **hooks)(), {"max_epochs": 2}


@scenario
def rows_every_third_step_while_accumulating(library: Any) -> Any:
    def train(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        self.log("x", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True)

    model = steps(library, train=train)()
    model.train_dataloader = lambda: data(7)
    return model, {"accumulate_grad_batches": 2, "log_every_n_steps": 3, "max_epochs": 3}


@scenario
def validation_inside_the_epoch(library: Any) -> Any:
    def train(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        self.log("x", float(batch_idx), on_step=True, on_epoch=True)

    model = steps(library, train=train, evaluate=lambda self, b, i, loss: self.log("v", loss, on_step=True))()
    model.train_dataloader = lambda: data(5)
    return model, {"val_check_interval": 2, "max_epochs": 2}


@scenario
def an_axis_and_an_epoch_of_ones_own(library: Any) -> Any:
    def train(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        self.log("step", 10.0 * (1 + self.global_step))
        self.log("loss", loss)

    def evaluate(self: Any, batch: Any, batch_idx: int, loss: Any) -> None:
        self.log("epoch", 7.0)
        self.log("v", loss)

    return steps(library, train=train, evaluate=evaluate)(), {"max_epochs": 2}


def manual(library: Any, optimizers: int) -> Any:
    class Manual(module_class(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            found = self.optimizers()
            for index, optimizer in enumerate(found if isinstance(found, list) else [found]):
                loss = self.layer(batch).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.log(f"loss_{index}", loss, prog_bar=True, on_step=True, on_epoch=True)
            self.log("global_step", float(self.global_step))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1 / (i + 1)) for i in range(optimizers)]

    model = Manual()
    model.train_dataloader = lambda: data(5)
    return model


@scenario
def manual_optimization_with_one(library: Any) -> Any:
    return manual(library, 1), {"max_epochs": 2, "log_every_n_steps": 2}


@scenario
def manual_optimization_with_three(library: Any) -> Any:
    return manual(library, 3), {"max_epochs": 2, "log_every_n_steps": 2}


def with_metrics(library: Any, **options: Any) -> Any:
    from torchmetrics import MeanMetric, MetricCollection, SumMetric

    class Metrics(module_class(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.val_mean = MeanMetric(), MeanMetric()
            self.several = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()}, prefix="all_")
            self.per_loader = nn.ModuleList([SumMetric(), SumMetric()])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).square().mean()
            self.mean(loss.detach() + batch_idx)
            self.several(batch[:, 0])
            self.log("mean", self.mean, prog_bar=True, **options)
            self.log_dict(self.several, **options)
            return loss

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.val_mean.update(self.layer(batch).detach().mean())
            self.per_loader[dataloader_idx](batch.mean())
            self.log("val_sum", self.per_loader[dataloader_idx], metric_attribute=f"per_loader.{dataloader_idx}")

        test_step = validation_step

        def on_validation_epoch_end(self) -> None:
            self.log("val_mean", self.val_mean)

        def val_dataloader(self) -> Any:
            return [data(2, 1), data(3, 2)]

        test_dataloader = val_dataloader

    return Metrics()


@scenario
def metric_objects(library: Any) -> Any:
    return with_metrics(library), {"max_epochs": 2}


@scenario
def metric_objects_on_step_and_epoch(library: Any) -> Any:
    return with_metrics(library, on_step=True, on_epoch=True), {"max_epochs": 2}


@scenario
def metric_objects_on_epoch(library: Any) -> Any:
    return with_metrics(library, on_step=False, on_epoch=True), {"max_epochs": 2}


@scenario
def nothing_logged(library: Any) -> Any:
    return steps(library)(), {}


@scenario
def a_quick_run(library: Any) -> Any:
    return steps(library, train=ways("t"), evaluate=ways("v"))(), {"fast_dev_run": 2}


@scenario
def several_loggers(library: Any) -> Any:
    return steps(library, train=ways("t"))(), {"two_loggers": True, "log_every_n_steps": 2}


READ = [
    "on_sanity_check_end", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end",
    "on_validation_end", "on_test_start", "on_test_batch_end", "on_test_epoch_end", "on_test_end", "on_fit_end",
    "teardown",
]  # fmt: skip


def reader(library: Any, seen: list[Any]) -> Any:
    """A callback that reads the three views in each hook."""

    def method(name: str) -> Callable[..., None]:
        def read(self: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(
                (name, *(plain(getattr(trainer, f"{view}_metrics")) for view in ("callback", "logged", "progress_bar")))
            )

        return read

    return type("Reader", (library.Callback,), {name: method(name) for name in READ})()


def view(library: Any, name: str) -> dict[str, Any]:
    model, options = SCENARIOS[name](library)
    seen: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.pop("two_loggers", False):
            loggers = importlib.import_module(f"{library.__name__}.loggers")
            options["logger"] = [loggers.CSVLogger(f"{folder}/a"), loggers.CSVLogger(f"{folder}/b")]
        options["callbacks"] = [*options.pop("callbacks", []), reader(library, seen)]
        trainer = trainer_of(library, folder, **options)
        trainer.fit(model)
        for logger in trainer.loggers:
            logger.save()
        after_fit = [
            plain(trainer.callback_metrics),
            plain(trainer.logged_metrics),
            plain(trainer.progress_bar_metrics),
        ]
        validated = [plain(one) for one in trainer.validate(model, verbose=False)]
        after_validate = [plain(trainer.callback_metrics), plain(trainer.logged_metrics)]
        tested = [plain(one) for one in trainer.test(model, verbose=False)]
        return {
            "seen": seen,
            "after_fit": after_fit,
            "validate": validated,
            "after_validate": after_validate,
            "test": tested,
            "rows": [rows(str(path)) for path in sorted(Path(folder).iterdir())],
        }


def views(library: Any) -> dict[str, Any]:
    return {name: view(library, name) for name in SCENARIOS}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = {"places": places, "views": views}[sys.argv[2]](importlib.import_module(sys.argv[1]))
    print("RESULT" + json.dumps(found))
