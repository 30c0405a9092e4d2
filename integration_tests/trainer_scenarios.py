"""What users see of a Trainer, recorded under a package with Lightning's names and printed as JSON.

``python trainer_scenarios.py LIBRARY`` is started once for fulmen and once for Lightning; the two outputs are compared.
A scenario is a function that returns what it saw.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import tempfile
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCENARIOS: dict[str, Callable[[Any], Any]] = {}


def scenario(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SCENARIOS[function.__name__] = function
    return function


def numbers(samples: int, start: int = 0, **options: Any) -> DataLoader[Any]:
    values = torch.arange(start, start + samples, dtype=torch.float32).reshape(samples, 1)
    return DataLoader(values, **{"batch_size": 2, **options})  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


class Stream(IterableDataset[Any]):
    """Does not know its length; notes how far it has been read."""

    def __init__(self, samples: int) -> None:
        self.samples, self.read = samples, 0

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.samples):
            self.read = index + 1
            yield torch.tensor([float(index)])


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.samples


def trainer(library: Any, **options: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return library.Trainer(**{**quiet, **options})


def model_of(library: Any) -> type:
    class Model(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            nn.init.constant_(self.layer.weight, 0.5)
            nn.init.zeros_(self.layer.bias)
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(f"t{batch_idx}")
            return self.layer(batch).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                self.seen.append("v")
            self.log("val", batch.mean())

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("test", self.layer(batch).mean())

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Model


def plain(value: Any) -> Any:
    """As JSON knows it, with floats that two libraries may compute in another order rounded."""
    if isinstance(value, torch.Tensor):
        return [round(number, 4) for number in value.flatten().tolist()]
    if isinstance(value, float):
        return str(value) if value in (float("inf"), float("-inf")) else round(value, 4)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


# ------------------------------------------------------------------ when to validate


def _order(library: Any, loader: Any = None, **options: Any) -> str:
    model = model_of(library)()
    trainer(library, **{"max_epochs": 2, **options}).fit(model, numbers(14) if loader is None else loader, numbers(4))
    return " ".join(model.seen)


@scenario
def validation_intervals(library: Any) -> Any:
    return {
        "default": _order(library),
        "none": _order(library, val_check_interval=None),
        "fraction": _order(library, val_check_interval=0.3),
        "small fraction": _order(library, val_check_interval=0.01),
        "batches": _order(library, val_check_interval=3),
        "every second epoch": _order(library, val_check_interval=3, check_val_every_n_epoch=2, max_epochs=4),
        "across epochs": _order(library, val_check_interval=4, check_val_every_n_epoch=None),
        "longer than the epoch": _order(library, val_check_interval=10, check_val_every_n_epoch=None, max_epochs=3),
        "longer, without validation": _order(library, val_check_interval=10, limit_val_batches=0),
        "unknown length": _order(library, DataLoader(Stream(10), batch_size=2)),
        "unknown length, batches": _order(library, DataLoader(Stream(10), batch_size=2), val_check_interval=2),
        "accumulating": _order(library, val_check_interval=3, accumulate_grad_batches=2),
    }


@scenario
def validation_by_the_clock(library: Any) -> Any:
    """Each training batch takes 10 s, each validation 25 s, by a clock that only they move."""

    def run(**options: Any) -> str:
        now = [1000.0]

        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                now[0] += 10
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                if batch_idx == 0:
                    now[0] += 25
                    self.seen.append("v")

        model, real = Model(), time.monotonic
        time.monotonic = lambda: now[0]
        try:
            trainer(library, **{"max_epochs": 4, **options}).fit(model, numbers(10), numbers(4))
        finally:
            time.monotonic = real
        return " ".join(model.seen)

    return {
        "30 s": run(val_check_interval="00:00:00:30"),
        "30 s as dict, across epochs": run(val_check_interval={"seconds": 30}, check_val_every_n_epoch=None),
        "70 s": run(val_check_interval="00:00:01:10"),
        "every second epoch": run(val_check_interval="00:00:00:20", check_val_every_n_epoch=2),
        "never": run(val_check_interval="01:00:00:00"),
    }


# ------------------------------------------------------------------ how far


@scenario
def limits_of_a_run(library: Any) -> Any:
    def run(**options: Any) -> Any:
        model = model_of(library)()
        calls: list[str] = []

        class Calls(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
                calls.append("setup " + stage)

            def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
                calls.append("teardown " + stage)

            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                calls.append("fit start")

            def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
                calls.append("fit end")

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                calls.append("train start")

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                calls.append("train end")

        made = trainer(library, callbacks=[Calls()], **options)
        made.fit(model, numbers(8))
        return [
            made.global_step,
            made.current_epoch,
            made.max_epochs,
            made.max_steps,
            made.min_epochs or 0,
            made.min_steps or 0,
            calls,
            len(model.seen),
        ]

    return {
        str(options): run(**options)
        for options in (
            {"max_epochs": 0},
            {"max_steps": 0},
            {"max_epochs": 2},
            {"max_epochs": None, "max_steps": 6},
            {"max_epochs": 3, "max_steps": 5},
            {"max_epochs": 1, "max_steps": 50},
            {"max_epochs": 2, "min_epochs": 1},
            {"max_epochs": None, "max_steps": 6, "min_steps": 3},
            {"max_epochs": 2, "accumulate_grad_batches": 3},
            {"max_epochs": -1, "max_steps": 9, "accumulate_grad_batches": 2},
            {"max_epochs": 3, "limit_train_batches": 0},
        )
    }


@scenario
def requests_to_stop(library: Any) -> Any:
    def run(at: int, **options: Any) -> Any:
        class Stop(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.fit_loop.epoch_loop.total_batch_idx == at:
                    trainer.should_stop = True

        model = model_of(library)()
        made = trainer(library, callbacks=[Stop()], **{"max_epochs": 4, **options})
        made.fit(model, numbers(8), numbers(2))
        return [" ".join(model.seen), made.global_step, made.current_epoch, made.should_stop]

    return {
        "at once": run(1),
        "after min_epochs": run(1, min_epochs=2),
        "after min_steps": run(1, min_steps=6),
        "after both": run(1, min_steps=2, min_epochs=3),
        "in an epoch without validation": run(1, check_val_every_n_epoch=2),
        "between validations": run(2, val_check_interval=2),
        "right after one": run(1, val_check_interval=2),
        "at the end of an epoch": run(3),
    }


@scenario
def estimated_steps(library: Any) -> Any:
    def run(loader: Any, **options: Any) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self.layer.weight.sum()

            def configure_optimizers(self) -> Any:
                self.estimate = self.trainer.estimated_stepping_batches
                return super().configure_optimizers()

        model = Model()
        made = trainer(library, **options)
        made.fit(model, loader)
        return [model.estimate, made.global_step]

    grid = itertools.product((1, 2, 3), (1, 4), (-1, 3, 100), (1.0, 0.5, 3))
    return {
        **{
            f"{epochs} {accumulate} {steps} {limit}": run(
                numbers(14),
                max_epochs=epochs,
                accumulate_grad_batches=accumulate,
                max_steps=steps,
                limit_train_batches=limit,
            )
            for epochs, accumulate, steps, limit in grid
        },
        "unbounded epochs": run(numbers(14), max_epochs=-1, max_steps=5),
        "unknown length, steps": run(DataLoader(Stream(6), batch_size=2), max_epochs=1, max_steps=2),
        "a stream that knows its length": run(DataLoader(SizedStream(7), batch_size=2), max_epochs=2),
        "several loaders": run({"a": numbers(6), "b": numbers(10)}, max_epochs=2),
    }


# ------------------------------------------------------------------ batches


def _trained_on(library: Any, loaders: Any, **options: Any) -> Any:
    class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(plain(batch))
            return self.layer.weight.sum()

    model = Model()
    made = trainer(library, **options)
    made.fit(model, loaders)
    return [model.seen, made.num_training_batches, made.global_step]


@scenario
def batches_of_loaders(library: Any) -> Any:
    combined = importlib.import_module(
        "lightning.pytorch.utilities" if library.__name__.startswith("lightning") else "fulmen_data"
    ).CombinedLoader
    return {
        "dict": _trained_on(library, {"a": numbers(4), "b": numbers(8, 100)}),
        "list": _trained_on(library, [numbers(4), numbers(8, 100)]),
        "nested": _trained_on(library, {"a": [numbers(4), numbers(2, 50)], "b": {"c": numbers(6, 100)}}),
        "limit per loader": _trained_on(library, [numbers(4), numbers(8, 100)], limit_train_batches=0.5),
        "int limit per loader": _trained_on(library, [numbers(4), numbers(12, 100)], limit_train_batches=3),
        "shortest": _trained_on(library, combined([numbers(4), numbers(8, 100)], "min_size")),
        "longest": _trained_on(library, combined([numbers(4), numbers(8, 100)], "max_size")),
        "shortest, limited": _trained_on(
            library, combined([numbers(8), numbers(12, 100)], "min_size"), limit_train_batches=2
        ),
        "any iterable": _trained_on(library, _Own()),
        "several of them": _trained_on(library, [_Own(), _Own()]),
        "stream": _trained_on(library, DataLoader(Stream(5), batch_size=2)),
        "stream with a limit": _trained_on(library, DataLoader(Stream(9), batch_size=2), limit_train_batches=2),
        "stream that knows its length": _trained_on(
            library, DataLoader(SizedStream(9), batch_size=2), limit_train_batches=0.5
        ),
        "generator of tensors": _trained_on(library, (torch.full((1, 1), float(i)) for i in range(3))),
    }


class _Own:
    def __iter__(self) -> Iterator[Any]:
        return iter([torch.zeros(1, 1), torch.ones(1, 1)])


@scenario
def limits_of_evaluation(library: Any) -> Any:
    class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def note(self, name: str, batch: Any, dataloader_idx: int) -> None:
            self.seen.append([name, plain(batch), dataloader_idx])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.note("val", batch, dataloader_idx)

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.note("test", batch, dataloader_idx)

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.note("predict", batch, dataloader_idx)

    found: dict[str, Any] = {}
    for limit in (1, 1.0, 0.5, 3, 0):
        model = Model()
        limits = {f"limit_{stage}_batches": limit for stage in ("val", "test", "predict")}
        made = trainer(library, limit_train_batches=1, **limits)
        loaders = [numbers(8), numbers(4, 100)]
        made.fit(model, numbers(2), loaders)
        validated = list(made.num_val_batches)
        made.validate(model, loaders, verbose=False)
        made.test(model, loaders, verbose=False)
        made.predict(model, loaders)
        found[str(limit)] = [model.seen, validated]
        if limit:  # a loop that is turned off need not know
            found[str(limit)] += [list(made.num_test_batches), list(made.num_predict_batches)]
    return found


@scenario
def overfitting(library: Any) -> Any:
    def run(train: Any, val: Any, **options: Any) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.seen.append(["t", plain(batch)])
                return self.layer(batch).mean()

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.seen.append(["v", plain(batch)])

        model = Model()
        made = trainer(library, **{"max_epochs": 2, **options})
        made.fit(model, train, val)
        return [model.seen, made.num_training_batches, list(made.num_val_batches)]

    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 8, 8)
    return {
        "batches": run(numbers(8, shuffle=True), numbers(6, 100, shuffle=True), overfit_batches=2),
        "a share": run(numbers(8, shuffle=True), numbers(8, 100), overfit_batches=0.5),
        "another sampler": run(numbers(8, sampler=sampler), numbers(6, 100), overfit_batches=2),
        "in a quick run": run(numbers(8), numbers(6, 100), overfit_batches=2, fast_dev_run=1),
        "with limits": run(numbers(8), numbers(6, 100), overfit_batches=1, limit_train_batches=3, limit_val_batches=3),
    }


@scenario
def quick_run(library: Any) -> Any:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    found: dict[str, Any] = {}
    for n in (True, 3):
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(library)()
            made = trainer(
                library,
                fast_dev_run=n,
                logger=True,
                enable_checkpointing=True,
                num_sanity_val_steps=5,
                val_check_interval=0.1,
                max_epochs=7,
                default_root_dir=folder,
                callbacks=[callbacks.EarlyStopping("nowhere"), callbacks.ModelCheckpoint(monitor="nowhere")],
            )
            made.fit(model, numbers(20), numbers(20))
            made.test(model, numbers(20), verbose=False)
            predictions = made.predict(model, numbers(20))
            found[str(n)] = [
                " ".join(model.seen),
                made.global_step,
                made.max_epochs,
                made.max_steps,
                made.num_sanity_val_steps,
                made.val_check_interval,
                type(made.logger).__name__,
                len(predictions),
                list(made.num_test_batches),
                made.log_every_n_steps,
            ]
    return found


@scenario
def reading_ahead(library: Any) -> Any:
    """How many samples were read when each batch is trained on."""

    def run(data: Any, **options: Any) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.seen.append(data.read)
                return self.layer(batch).mean()

            def on_train_batch_end(self, *_: Any) -> None:
                self.seen.append(self.trainer.is_last_batch)

        model = Model()
        trainer(library, **options).fit(model, DataLoader(data, batch_size=1))
        return model.seen

    return {"unknown length": run(Stream(4)), "one batch": run(Stream(1))}


# ------------------------------------------------------------------ steps


@scenario
def outputs_of_steps(library: Any) -> Any:
    def run(**options: Any) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = self.layer(batch).mean() + 1
                if batch_idx == 1:
                    return None
                if batch_idx == 2:
                    self.kept = self.layer(batch)
                    return {"loss": loss, "own": self.kept, "note": "text"}
                return loss

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                entry: dict[str, Any] = {"outputs": plain(outputs)}
                if batch_idx == 2:
                    entry["same object"] = outputs["own"] is self.kept
                    entry["on the graph"] = outputs["own"].requires_grad
                    entry["loss detached"] = not outputs["loss"].requires_grad
                self.seen.append(entry)

        model = Model()
        made = trainer(library, **options)
        made.fit(model, numbers(10))
        return [model.seen, made.global_step, plain(model.layer.weight)]

    class Manual(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).mean()
            return (loss, None, {"loss": loss, "own": "text"}, {"no": "loss"})[batch_idx]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(plain(outputs))

    manual = Manual()
    trainer(library).fit(manual, numbers(8))
    return {"one by one": run(), "accumulating": run(accumulate_grad_batches=2), "manual": manual.seen}


@scenario
def steps_that_fetch_their_batches(library: Any) -> Any:
    def run(loader: Callable[[], Any], per_step: int = 1) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def take(self, name: str, dataloader_iter: Any) -> Any:
                for _ in range(per_step):
                    batch, batch_idx, dataloader_idx = next(dataloader_iter)
                    self.seen.append([name, plain(batch), batch_idx, dataloader_idx])
                return self.layer(batch).mean()

            def training_step(self, dataloader_iter: Any) -> Any:
                return self.take("train", dataloader_iter)

            def validation_step(self, dataloader_iter: Any) -> Any:
                self.log("val", self.take("val", dataloader_iter), batch_size=1)

            def test_step(self, dataloader_iter: Any) -> Any:
                self.take("test", dataloader_iter)

            def predict_step(self, dataloader_iter: Any) -> Any:
                return self.take("predict", dataloader_iter)

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.seen.append(["train start", plain(batch), batch_idx])

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.seen.append(["train end", plain(outputs), plain(batch), batch_idx])

            def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.seen.append(["val end", plain(batch), batch_idx])

            def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.seen.append(["predict end", plain(outputs), plain(batch), batch_idx])

        model = Model()
        made = trainer(library, max_epochs=2)
        made.fit(model, loader(), loader())
        counts = [made.global_step, made.current_epoch]
        made.test(model, loader(), verbose=False)
        made.predict(model, loader())
        return [model.seen, counts]

    return {
        "known length": run(lambda: numbers(6)),
        "several a step": run(lambda: numbers(8), per_step=2),
    }


@scenario
def schedules(library: Any) -> Any:
    def run(configuration: Callable[[Any], Any], **options: Any) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                return {"optimizer": optimizer, "lr_scheduler": configuration(optimizer)}

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val", 1.0)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("train", 1.0)
                return self.layer(batch).mean()

        model = Model()
        model.rates = []
        made = trainer(library, **{"max_epochs": 5, **options})
        made.fit(model, numbers(8), numbers(2))
        return [plain(model.rates), made.optimizers[0].param_groups[0]["lr"]]

    def halving(optimizer: Any, **options: Any) -> Any:
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), **options}

    def plateau(optimizer: Any, **options: Any) -> Any:
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"scheduler": scheduler, **options}

    return {
        "epoch": run(lambda o: halving(o)),
        "every second epoch": run(lambda o: halving(o, frequency=2)),
        "step": run(lambda o: halving(o, interval="step")),
        "every third step": run(lambda o: halving(o, interval="step", frequency=3)),
        "step, accumulating": run(lambda o: halving(o, interval="step"), accumulate_grad_batches=3),
        "epoch, accumulating": run(lambda o: halving(o), accumulate_grad_batches=3),
        "plateau": run(lambda o: plateau(o, monitor="val")),
        "plateau every second epoch": run(lambda o: plateau(o, monitor="val", frequency=2)),
        "plateau by step": run(lambda o: plateau(o, monitor="train", interval="step", frequency=2)),
        "plateau by step of a validation": run(
            lambda o: plateau(o, monitor="val", interval="step", frequency=2), val_check_interval=2
        ),
        "plateau without its metric": run(lambda o: plateau(o, monitor="nowhere", strict=False)),
        "stopped inside an epoch": run(lambda o: halving(o), max_steps=6, max_epochs=-1),
    }


@scenario
def own_scheduler(library: Any) -> Any:
    class Own:
        """No scheduler of torch's."""

        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.count = optimizer, 0

        def advance(self, by: Any) -> None:
            self.count += 1
            self.optimizer.param_groups[0]["lr"] = 1.0 / (1 + self.count)

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

        def step(self) -> None:
            raise AssertionError("the module steps it")

    class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [Own(optimizer)]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.seen.append(str(metric))
            scheduler.advance(metric)

    model = Model()
    made = trainer(library, max_epochs=3)
    made.fit(model, numbers(4))
    return [model.seen, made.optimizers[0].param_groups[0]["lr"]]


# ------------------------------------------------------------------ calls and properties


@scenario
def arguments_of_calls(library: Any) -> Any:
    class Data(library.LightningDataModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def train_dataloader(self) -> Any:
            return numbers(4)

        def val_dataloader(self) -> Any:
            return numbers(4, 10)

        def test_dataloader(self) -> Any:
            return numbers(4, 20)

        def predict_dataloader(self) -> Any:
            return numbers(4, 30)

    class Own(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def val_dataloader(self) -> Any:
            return numbers(2, 100)

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(library)()
        made = trainer(library, enable_checkpointing=True, default_root_dir=folder)
        found["fit returns"] = made.fit(model, datamodule=Data())
        path = made.checkpoint_callback.best_model_path
        with torch.no_grad():
            model.layer.weight.fill_(9.0)
        found["validate"] = made.validate(model, numbers(4), verbose=False)
        found["validate, datamodule"] = made.validate(model, datamodule=Data(), verbose=False)
        found["validate, datamodule as loaders"] = made.validate(model, Data(), verbose=False)
        found["test changed weights"] = made.test(model, numbers(4), verbose=False)
        found["test, path"] = made.test(model, numbers(4), ckpt_path=path, verbose=False)
        with torch.no_grad():
            model.layer.weight.fill_(9.0)
        found["test, best without a model"] = made.test(dataloaders=numbers(4), verbose=False)
        with torch.no_grad():
            model.layer.weight.fill_(9.0)
        found["test, best"] = made.test(model, numbers(4), ckpt_path="best", verbose=False)
        found["test, weights_only"] = made.test(model, numbers(4), ckpt_path=path, weights_only=True, verbose=False)
        found["predict"] = plain(made.predict(model, numbers(4)))
        found["predict, datamodule"] = plain(made.predict(model, datamodule=Data()))
        found["predict, path"] = plain(made.predict(model, numbers(4), ckpt_path=path))
        found["predict, nothing kept"] = made.predict(model, numbers(4), return_predictions=False)
        fresh = trainer(library)
        found["loaders of the module"] = fresh.validate(Own(), verbose=False)
        found["loaders beat the module"] = trainer(library).validate(Own(), numbers(4), verbose=False)
        found["datamodule beats the module"] = trainer(library).validate(Own(), datamodule=Data(), verbose=False)
        made = trainer(library)
        made.fit(model, Data())
        found["fit, datamodule as loaders"] = made.global_step
    return plain(found)


@scenario
def readings(library: Any) -> Any:
    """Plain properties of the Trainer at each moment of a fit, a test and a prediction."""
    names = (
        "global_step", "current_epoch", "max_epochs", "max_steps", "num_training_batches", "num_val_batches",
        "num_sanity_val_batches", "num_test_batches", "num_predict_batches", "accumulate_grad_batches",
        "log_every_n_steps", "val_check_interval", "val_check_batch", "check_val_every_n_epoch", "limit_train_batches",
        "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches", "should_stop",
        "sanity_checking", "training", "validating", "testing", "predicting", "evaluating", "fast_dev_run",
        "received_sigterm", "interrupted", "is_global_zero", "global_rank", "local_rank", "node_rank", "world_size",
        "num_nodes", "num_devices", "device_ids", "precision", "enable_validation",
        "num_sanity_val_steps", "ckpt_path", "reload_dataloaders_every_n_epochs", "barebones", "scaler",
        "gradient_clip_val", "enable_autolog_hparams", "default_root_dir",
    )  # fmt: skip
    seen: list[Any] = []

    def read(moment: str, made: Any) -> None:
        state = made.state
        loop = made.fit_loop
        progress = loop.epoch_loop.batch_progress
        module = made.lightning_module
        entry: dict[str, Any] = {name: getattr(made, name) for name in names}
        entry |= {
            "state": [state.fn.value, state.stage.value, state.status.value],
            "loop": [loop.max_epochs, loop.max_batches, loop.epoch_loop._batches_that_stepped],
            "progress": [progress.current.ready, progress.total.ready] if moment == "train batch end" else None,
            "device": str(made.strategy.root_device),
            "module is": made.model is module,
            "optimizers": [type(optimizer).__name__ for optimizer in made.optimizers],
            "callback_metrics": sorted(made.callback_metrics),
            "estimate": made.estimated_stepping_batches if state.stage.value == "train" else None,
            "last batch": made.is_last_batch if state.fn.value == "fit" else None,
            "hook": module._current_fx_name if moment == "train batch end" else None,
        }
        seen.append([moment, plain(entry)])

    class Watch(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            read("sanity check end", trainer)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            read("train start", trainer)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            read("train batch end", trainer)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            read("validation end", trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            read("train epoch end", trainer)

        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            read("test end", trainer)

        def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
            read("predict end", trainer)

    made = trainer(
        library,
        callbacks=[Watch()],
        max_epochs=2,
        num_sanity_val_steps=1,
        val_check_interval=2,
        accumulate_grad_batches=2,
        gradient_clip_val=3.0,
        default_root_dir="/tmp",
        limit_val_batches=1,
    )
    model = model_of(library)()
    made.fit(model, numbers(10), numbers(4))
    made.test(model, numbers(4), verbose=False)
    made.predict(model, numbers(4))
    return seen


@scenario
def precisions(library: Any) -> Any:
    """Where a precision casts: the batch, the module, and never the outputs."""

    def run(precision: str) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                self.seen.append(["before transfer", str(batch.dtype)])
                return batch

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                output = self.layer(batch)
                dtypes = (batch, output, self.layer.weight, torch.ones(1))
                self.seen.append(["step", *(str(tensor.dtype) for tensor in dtypes)])
                return output.mean()

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                return self.layer(batch)

        model = Model()
        made = trainer(library, precision=precision)
        made.fit(model, numbers(2))
        predicted = made.predict(model, numbers(2))
        return [model.seen, str(predicted[0].dtype), made.precision, made.scaler is None]

    return {name: run(name) for name in ("32-true", "64-true", "bf16-true", "bf16-mixed")}


@scenario
def sanity_check(library: Any) -> Any:
    def run(path: str | None = None, save: str | None = None, **options: Any) -> Any:
        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val", 1.0)
                self.seen.append(f"{'s' if self.trainer.sanity_checking else 'v'}{batch_idx}")

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                if save is not None and batch_idx == 1:
                    self.trainer.save_checkpoint(save)

            def on_train_start(self) -> None:
                metrics = len(self.trainer.callback_metrics) if path is None else "resumed"
                self.seen.append(f"train, {metrics} metrics")

        model = Model()
        made = trainer(library, **options)
        made.fit(model, numbers(6), options.pop("loaders", numbers(8)), ckpt_path=path)
        return model.seen

    def run_with(**when: Any) -> str:
        saves = library.callbacks.ModelCheckpoint(dirpath=f"{folder}/{len(when)}{list(when)}", **when)
        run(num_sanity_val_steps=0, enable_checkpointing=True, callbacks=[saves])
        return str(saves.best_model_path)

    with tempfile.TemporaryDirectory() as folder:
        inside = f"{folder}/inside.ckpt"
        return {
            "two": run(num_sanity_val_steps=2),
            "all": run(num_sanity_val_steps=-1),
            "default": run(num_sanity_val_steps=None),
            "none": run(num_sanity_val_steps=0),
            "limited": run(num_sanity_val_steps=3, limit_val_batches=1),
            "no validation": run(num_sanity_val_steps=2, limit_val_batches=0),
            "quick": run(num_sanity_val_steps=2, fast_dev_run=True),
            "saved": run(num_sanity_val_steps=2, save=inside),
            "resumed inside an epoch": run(path=inside, num_sanity_val_steps=2)[:3],
            "resumed after an epoch": [
                run(path=run_with(**when), num_sanity_val_steps=2, max_epochs=2)
                for when in ({}, {"monitor": "val"}, {"save_on_train_epoch_end": True})
            ],
        }


@scenario
def modes_of_modules(library: Any) -> Any:
    class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Dropout(0.5).eval()

        def note(self, name: str) -> None:
            self.seen.append(
                [
                    name, self.training, self.layer.training, self.frozen.training,
                    torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                ]
            )  # fmt: skip

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.note("train")
            return self.layer(batch).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.note("val")

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.note("test")

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.note("predict")

    class OwnMode(Model):
        def on_validation_model_train(self) -> None:
            self.seen.append("own")

    found: dict[str, Any] = {}
    for inference in (True, False):
        model = Model()
        made = trainer(library, max_epochs=2, inference_mode=inference)
        made.fit(model, numbers(2), numbers(2))
        for method in (made.validate, made.test, made.predict):
            method(model, numbers(2))
        model.note("after")
        found[str(inference)] = model.seen
    own = OwnMode()
    trainer(library, max_epochs=2).fit(own, numbers(2), numbers(2))
    found["own"] = own.seen
    evaluated = Model()
    evaluated.eval()
    trainer(library).fit(evaluated, numbers(2))
    found["starts in evaluation mode"] = evaluated.seen
    return found


@scenario
def loaders_made_anew(library: Any) -> Any:
    found: dict[str, Any] = {}
    for every in (0, 1, 2, 3):

        class Model(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def train_dataloader(self) -> Any:
                self.seen.append(f"train loader in epoch {self.trainer.current_epoch}")
                return numbers(4)

            def val_dataloader(self) -> Any:
                self.seen.append(f"val loader in epoch {self.trainer.current_epoch}")
                return numbers(2)

        model = Model()
        trainer(library, max_epochs=5, reload_dataloaders_every_n_epochs=every).fit(model)
        found[str(every)] = model.seen
    return found


@scenario
def changes_during_a_run(library: Any) -> Any:
    class Change(library.Callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.accumulate_grad_batches = 2
            if trainer.current_epoch == 2:
                trainer.fit_loop.max_epochs = 4
                trainer.accumulate_grad_batches = 1

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append([trainer.current_epoch, batch_idx, trainer.global_step])

    seen: list[Any] = []
    made = trainer(library, max_epochs=9, callbacks=[Change()])
    made.fit(model_of(library)(), numbers(8))
    return [seen, made.global_step]


@scenario
def calls_after_an_error(library: Any) -> Any:
    class Failing(model_of(library)):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        calls = fails_at = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            if self.calls == self.fails_at:
                raise RuntimeError("something went wrong")
            seen.append([batch_idx, float(batch[0, 0]), self.trainer.global_step])
            return super().training_step(batch, batch_idx)

        def on_train_epoch_start(self) -> None:
            seen.append("epoch")

    found = []
    for fails_at, accumulate in ((1, 1), (4, 1), (4, 2), (7, 3)):
        seen: list[Any] = []
        made, model, loader = trainer(library, max_epochs=2, accumulate_grad_batches=accumulate), Failing(), numbers(10)
        model.fails_at = fails_at
        try:
            made.fit(model, loader, numbers(4))
        except RuntimeError:
            seen.append(["failed", made.global_step, made.current_epoch])
        made.validate(model, numbers(4), verbose=False)
        made.fit(model, loader, numbers(4))
        found.append([seen, made.global_step, made.current_epoch, model.layer.weight])
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    wanted = sys.argv[2:] or list(SCENARIOS)
    library = importlib.import_module(sys.argv[1])
    print("RESULT" + json.dumps({name: plain(SCENARIOS[name](library)) for name in wanted}))
