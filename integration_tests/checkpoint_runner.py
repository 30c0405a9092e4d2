"""Runs the callbacks that save, stop and write predictions under a package with Lightning's names; prints JSON.

``python checkpoint_runner.py LIBRARY`` is started once for fulmen and once for Lightning; the two outputs are compared.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import math
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

if TYPE_CHECKING:
    from collections.abc import Callable

VALUES = [0.5, 0.3, 0.7, 0.2, 0.9, 0.4, 0.25, 0.6]
BATCHES = 4


def model_of(library: Any, script: list[float], fail_at: int = -1) -> Any:
    class Scripted(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        """Logs written values: for each validation, each step, and each training epoch."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.validations = self.steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.steps == fail_at:
                raise LookupError("on purpose")
            self.log("loss", script[self.steps % len(script)])
            self.log("train_loss", script[self.steps % len(script)], on_step=False, on_epoch=True, batch_size=1)
            self.steps += 1
            return self.layer(batch).sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", script[self.validations % len(script)], batch_size=1)
            self.log("val/loss", script[self.validations % len(script)], batch_size=1)

        def on_validation_epoch_end(self) -> None:
            self.validations += 1

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return batch * 2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Scripted()


def loader(batches: int) -> Any:
    return DataLoader(torch.ones(batches, 1))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def fit(library: Any, model: Any, callbacks: Any, folder: str, ckpt_path: Any = None, **options: Any) -> Any:
    trainer = library.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 4,
            "logger": False,
            "default_root_dir": folder,
            "callbacks": callbacks,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            **options,
        }
    )
    trainer.fit(model, loader(BATCHES), loader(1), ckpt_path=ckpt_path)
    return trainer


def left_behind(folder: Path) -> dict[str, Any]:
    """Every checkpoint with its link's target and what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.ckpt")):
        content = torch.load(path, weights_only=False)
        found[str(path.relative_to(folder))] = {
            "link": os.readlink(path) if path.is_symlink() else None,
            "epoch": content["epoch"],
            "step": content["global_step"],
            "keys": sorted(set(content) - {"fulmen", "MixedPrecision"}),
            "callbacks": sorted(content.get("callbacks", ())),
        }
    return found


def ranking(callback: Any, folder: Path) -> dict[str, Any]:
    def name(path: str) -> str:
        return os.path.relpath(path, folder) if path else ""

    def number(value: Any) -> Any:
        return None if value is None else round(float(value), 5)

    return {
        "best": name(callback.best_model_path),
        "best_score": number(callback.best_model_score),
        "best_k": {name(path): number(score) for path, score in callback.best_k_models.items()},
        "kth": name(callback.kth_best_model_path),
        "kth_value": number(callback.kth_value),
        "last": name(callback.last_model_path),
        "current": number(callback.current_score),
        "state": sorted(set(callback.state_dict()) - {"written"}),
        "state_key": callback.state_key,
    }


SAVING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (arguments of ModelCheckpoint, options of the Trainer)
    "nothing said": ({}, {}),
    "best of min": ({"monitor": "val_loss", "save_top_k": 2}, {}),
    "best of max": ({"monitor": "val_loss", "save_top_k": 2, "mode": "max"}, {}),
    "best by an epoch's mean": ({"monitor": "train_loss", "save_top_k": 2}, {}),
    "all": ({"monitor": "val_loss", "save_top_k": -1}, {}),
    "all without monitor": ({"save_top_k": -1}, {}),
    "none": ({"save_top_k": 0}, {}),
    "none but the last": ({"save_top_k": 0, "save_last": True}, {}),
    "last": ({"save_last": True}, {}),
    "last with best": ({"monitor": "val_loss", "save_last": True}, {"max_epochs": 6}),
    "last with validations": ({"monitor": "val_loss", "save_last": True}, {"val_check_interval": 2}),
    "last with steps": ({"save_last": True, "every_n_train_steps": 3}, {}),
    "last as a link": ({"save_last": "link"}, {}),
    "last as a link to the best": ({"save_last": "link", "monitor": "val_loss", "save_top_k": 2}, {"max_epochs": 6}),
    "last as a link without others": ({"save_last": "link", "save_top_k": 0}, {}),
    "last at the end only": ({"save_last": True, "every_n_train_steps": 99}, {}),
    "steps": ({"every_n_train_steps": 3, "save_top_k": -1}, {}),
    "newest of steps": ({"every_n_train_steps": 3}, {}),
    "steps by their loss": ({"every_n_train_steps": 3, "save_top_k": 2, "monitor": "loss"}, {}),
    "steps with accumulation": ({"every_n_train_steps": 1, "save_top_k": -1}, {"accumulate_grad_batches": 2}),
    "a step before validation": (
        {"every_n_train_steps": 4, "save_top_k": -1, "monitor": "val_loss", "save_on_train_epoch_end": False},
        {},
    ),
    "a step long before the first validation": (
        {"every_n_train_steps": 3, "save_top_k": -1, "monitor": "val_loss", "save_on_train_epoch_end": False},
        {"max_epochs": 1},
    ),
    "a step within the last epoch's validations": (
        {"every_n_train_steps": 4, "save_top_k": 2, "monitor": "val_loss", "save_on_train_epoch_end": False},
        {"check_val_every_n_epoch": 1, "max_epochs": 5},
    ),
    "newest two of steps": ({"every_n_train_steps": 2, "save_top_k": 2, "monitor": "step", "mode": "max"}, {}),
    "newest two of epochs": ({"save_top_k": 2, "monitor": "epoch", "mode": "max"}, {}),
    "oldest of epochs": ({"monitor": "epoch"}, {}),
    "no trigger": ({"every_n_train_steps": 0, "save_last": True}, {}),
    "every second epoch": ({"every_n_epochs": 2, "save_top_k": -1}, {}),
    "every second epoch by validation": (
        {"every_n_epochs": 2, "save_top_k": -1, "monitor": "val_loss", "save_on_train_epoch_end": False},
        {},
    ),
    "after every validation": ({"monitor": "val_loss", "save_top_k": -1}, {"val_check_interval": 0.5}),
    "after training's part": (
        {"monitor": "train_loss", "save_top_k": -1, "save_on_train_epoch_end": True},
        {"val_check_interval": 0.5},
    ),
    "after every second epoch's validation": (
        {"monitor": "val_loss", "save_top_k": -1},
        {"check_val_every_n_epoch": 2},
    ),
    "without validation": ({"monitor": "train_loss", "save_top_k": 1}, {"limit_val_batches": 0}),
    "a template": ({"filename": "{epoch:02d}-{val_loss:.2f}-{missing}", "monitor": "val_loss"}, {}),
    "a template without names": (
        {"filename": "run-{epoch}-{val/loss:.2f}", "auto_insert_metric_name": False, "monitor": "val/loss"},
        {},
    ),
    "a template with folders": ({"filename": "{epoch}/{val_loss:.1f}", "save_top_k": -1}, {}),
    "names one of which begins like another": ({"filename": "{val_loss:.1f}{val}{val_loss_x}{epoch}"}, {}),
    "equal names": ({"filename": "model", "save_top_k": -1}, {}),
    "equal names of the best": ({"filename": "model", "save_top_k": 2, "monitor": "val_loss"}, {}),
    "equal names overwritten": ({"filename": "model", "save_top_k": -1, "enable_version_counter": False}, {}),
    "weights only": ({"save_weights_only": True, "save_last": True}, {}),
    "quick": ({"save_last": True, "every_n_train_steps": 1}, {"fast_dev_run": 2}),
    "not a number": ({"monitor": "nan", "save_top_k": 1}, {}),
    "other characters": ({"monitor": "val_loss", "save_last": True}, {}),
    "two optimizer steps to go": ({"every_n_train_steps": 5, "save_last": True}, {"max_steps": 7, "max_epochs": -1}),
}


def saving(library: Any) -> dict[str, Any]:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    found: dict[str, Any] = {}
    for name, (arguments, options) in SAVING.items():

        class Keep(callbacks.ModelCheckpoint):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            if name == "other characters":
                CHECKPOINT_JOIN_CHAR, CHECKPOINT_EQUALS_CHAR, CHECKPOINT_NAME_LAST = "_", ":", "{epoch}_newest"
                FILE_EXTENSION, STARTING_VERSION = ".ckpt", 3

        Keep.__qualname__ = "ModelCheckpoint"
        script = VALUES
        if name == "not a number":
            arguments, script = {**arguments, "monitor": "val_loss"}, [math.nan, 0.5, math.nan, 0.7]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(os.path.realpath(temporary))
            callback = Keep(dirpath=str(folder / "c"), **arguments)
            fit(library, model_of(library, script), [callback], str(folder), **options)
            found[name] = {"files": left_behind(folder), "ranking": ranking(callback, folder)}
    return found


def saving_in_default_places(library: Any) -> dict[str, Any]:
    loggers = importlib.import_module(f"{library.__name__}.loggers")
    found: dict[str, Any] = {}
    for name in ("no logger", "csv", "named csv"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(os.path.realpath(temporary))
            logger: Any = False
            if name == "csv":
                logger = loggers.CSVLogger(folder / "logs")
            elif name == "named csv":
                logger = loggers.CSVLogger(folder / "logs", name="mine", version="first")
            trainer = fit(library, model_of(library, VALUES), None, str(folder), logger=logger, max_epochs=1)
            found[name] = {
                "files": left_behind(folder),
                "folder": os.path.relpath(trainer.checkpoint_callback.dirpath, folder),
            }
    return found


def resuming(library: Any) -> dict[str, Any]:
    """A second run goes on with the first one's ranking: in its folder, and in another."""
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    found: dict[str, Any] = {}
    for name in ("same folder", "other folder"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(os.path.realpath(temporary))
            arguments = {"monitor": "val_loss", "save_top_k": 2, "save_last": True, "filename": "{epoch}"}
            first = callbacks.ModelCheckpoint(dirpath=str(folder / "first"), **arguments)
            fit(library, model_of(library, VALUES), [first], str(folder), max_epochs=3)
            place = "first" if name == "same folder" else "second"
            second = callbacks.ModelCheckpoint(dirpath=str(folder / place), **arguments)
            model = model_of(library, [0.1, 0.45])
            fit(library, model, [second], str(folder), folder / "first" / "last.ckpt", max_epochs=5)
            found[name] = {"files": left_behind(folder), "ranking": ranking(second, folder)}
    return found


def stopping_cases() -> list[dict[str, Any]]:
    """Configurations drawn at random, the same in every process."""
    draw = random.Random(5)
    cases: list[dict[str, Any]] = []
    while len(cases) < 40:
        mode = draw.choice(["min", "max"])
        script = [round(draw.uniform(0, 1), 2) for _ in range(draw.choice([3, 5, 12]))]
        if draw.random() < 0.2:
            script[draw.randrange(len(script))] = draw.choice([math.nan, math.inf, -math.inf])
        options = draw.choice(
            [{}, {}, {"val_check_interval": 2}, {"val_check_interval": 0.25}, {"check_val_every_n_epoch": 2}]
        )
        arguments: dict[str, Any] = {
            "monitor": draw.choice(["val_loss", "val_loss", "train_loss"]) if not options else "val_loss",
            "mode": mode,
            "patience": draw.choice([0, 1, 2, 3, 5]),
            "min_delta": draw.choice([0.0, 0.0, 0.1, -0.1]),
            "check_finite": draw.random() < 0.7,
        }
        if draw.random() < 0.4:
            arguments["stopping_threshold"] = 0.2 if mode == "min" else 0.8
        if draw.random() < 0.3:
            arguments["divergence_threshold"] = 0.9 if mode == "min" else 0.1
        if not options and draw.random() < 0.3:
            arguments["check_on_train_epoch_end"] = draw.random() < 0.5 or arguments["monitor"] == "train_loss"
        if draw.random() < 0.2:
            options = {**options, "min_epochs": 4}
        cases.append({"arguments": arguments, "script": script, "options": options})
    return cases


def stopping(library: Any) -> list[dict[str, Any]]:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    found: list[dict[str, Any]] = []
    for case in stopping_cases():
        with tempfile.TemporaryDirectory() as folder:
            stop = callbacks.EarlyStopping(**case["arguments"])
            model = model_of(library, case["script"])
            options = {"max_epochs": 9, "enable_checkpointing": False, **case["options"]}
            trainer = fit(library, model, [stop], folder, **options)
            found.append(
                {
                    "step": trainer.global_step,
                    "epoch": trainer.current_epoch,
                    "should_stop": trainer.should_stop,
                    "stopped_epoch": stop.stopped_epoch,
                    "wait_count": stop.wait_count,
                    "best": repr(round(float(stop.best_score), 4)),
                    "reason": stop.stopping_reason.value,
                    "reason_name": stop.stopping_reason.name,
                    "has_message": stop.stopping_reason_message is not None,
                    "state": sorted(stop.state_dict()),
                    "state_key": stop.state_key,
                    "min_delta": stop.min_delta,
                    "better": bool(stop.monitor_op(torch.tensor(1.0), torch.tensor(2.0))),
                }
            )
    return found


def stopping_state_survives(library: Any) -> dict[str, Any]:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    with tempfile.TemporaryDirectory() as folder:
        first = callbacks.EarlyStopping("val_loss", patience=3)
        trainer = fit(library, model_of(library, [0.2, 0.5, 0.5]), [first], folder, max_epochs=2)
        trainer.save_checkpoint(f"{folder}/here.ckpt")
        second = callbacks.EarlyStopping("val_loss", patience=3)
        model = model_of(library, [0.5])
        trainer = fit(library, model, [second], folder, f"{folder}/here.ckpt", max_epochs=9)
        state = {name: float(value) for name, value in second.state_dict().items() if name != "stopping_reason_message"}
        return {"state": state, "step": trainer.global_step, "waited": first.wait_count}


def failing(library: Any) -> dict[str, Any]:
    """A run with an OnExceptionCheckpoint fails, is started again, and ends."""
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.path.realpath(temporary))

        def start(fail_at: int) -> list[Any]:
            model = model_of(library, VALUES, fail_at)
            callback = callbacks.OnExceptionCheckpoint(str(folder))
            with contextlib.suppress(LookupError):
                fit(library, model, [callback], str(folder), max_epochs=2)
            return [model.steps, left_behind(folder)]

        found["failed"] = start(4)
        found["went on"] = start(-1)
        keep = callbacks.ModelCheckpoint(str(folder / "c"), save_on_exception=True, every_n_epochs=9, save_last=True)
        try:
            fit(library, model_of(library, VALUES, 6), [keep], str(folder))
        except LookupError:
            found["save_on_exception"] = [left_behind(folder), ranking(keep, folder)]
    return found


def user_managed_path(library: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        first = fit(library, model_of(library, VALUES), None, folder, max_epochs=1)
        first.save_checkpoint(f"{folder}/a.ckpt")
        trainer = library.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.ckpt_path = f"{folder}/a.ckpt"
        model = model_of(library, VALUES)
        trainer.fit(model, loader(BATCHES), loader(1))
        path = trainer.ckpt_path
        trainer.ckpt_path = None
        return {"steps": model.steps, "step": trainer.global_step, "path": os.path.basename(path)}


def writing(library: Any) -> dict[str, Any]:
    """What prediction writers get, for several kinds of loaders."""
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")

    class Writer(callbacks.BasePredictionWriter):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self, interval: str) -> None:
            super().__init__(interval)
            self.calls: list[Any] = []

        def write_on_batch_end(
            self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int,
            dataloader_idx: int,
        ) -> None:  # fmt: skip
            self.calls.append(
                ["batch", as_lists(prediction), batch_indices, as_lists(batch), batch_idx, dataloader_idx]
            )

        def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
            self.calls.append(["epoch", as_lists(predictions), batch_indices])

    values = torch.arange(7.0)
    batches = BatchSampler(SequentialSampler(values), 3, drop_last=False)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
    loaders: dict[str, Callable[[], Any]] = {
        "plain": lambda: DataLoader(values, batch_size=3),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "drop_last": lambda: DataLoader(values, batch_size=3, drop_last=True),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "several": lambda: [DataLoader(values, batch_size=4), DataLoader(values[:2])],  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "batch_sampler": lambda: DataLoader(values, batch_sampler=batches),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
    }
    found: dict[str, Any] = {}
    for name, make in loaders.items():
        for interval in ("batch", "epoch", "batch_and_epoch"):
            writer = Writer(interval)
            trainer = library.Trainer(
                accelerator="cpu", max_epochs=1, logger=False, callbacks=[writer], enable_progress_bar=False,
                enable_checkpointing=False,
            )  # fmt: skip
            trainer.predict(model_of(library, VALUES), make(), return_predictions=False)
            found[f"{name} {interval}"] = writer.calls
    return found


def as_lists(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else [as_lists(item) for item in value]


def surface(library: Any) -> dict[str, Any]:
    """Constructors, class attributes and the callbacks that are there by default."""
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    found: dict[str, Any] = {}
    for name in ("ModelCheckpoint", "EarlyStopping", "OnExceptionCheckpoint", "BasePredictionWriter"):
        parameters = inspect.signature(getattr(callbacks, name)).parameters.values()
        found[name] = [[p.name, None if p.default is p.empty else repr(p.default), str(p.kind)] for p in parameters]
    attributes = (
        "CHECKPOINT_JOIN_CHAR", "CHECKPOINT_EQUALS_CHAR", "CHECKPOINT_NAME_LAST", "FILE_EXTENSION", "STARTING_VERSION",
    )  # fmt: skip
    found["attributes"] = {name: getattr(callbacks.ModelCheckpoint, name) for name in attributes}
    found["extension"] = callbacks.OnExceptionCheckpoint.FILE_EXTENSION
    found["markers"] = [
        issubclass(getattr(callbacks, name), callbacks.Checkpoint)
        for name in ("ModelCheckpoint", "OnExceptionCheckpoint", "EarlyStopping")
    ]
    given = [callbacks.ModelCheckpoint("a"), callbacks.EarlyStopping("x"), callbacks.OnExceptionCheckpoint("b")]
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "max_time": "00:00:01:00"}
    found["defaults"] = [type(callback).__name__ for callback in library.Trainer(**options).callbacks]
    found["order"] = [type(callback).__name__ for callback in library.Trainer(**options, callbacks=given).callbacks]
    reasons = importlib.import_module(f"{library.__name__}.callbacks.early_stopping").EarlyStoppingReason
    found["reasons"] = {reason.name: reason.value for reason in reasons}
    intervals = importlib.import_module(f"{library.__name__}.callbacks.prediction_writer").WriteInterval
    found["intervals"] = {i.name: [i.value, i.on_batch, i.on_epoch] for i in intervals}
    return found


TOPICS = [
    surface, saving, saving_in_default_places, resuming, stopping, stopping_state_survives, failing, user_managed_path,
    writing,
]  # fmt: skip

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["NO_COLOR"] = "1"
    chosen = importlib.import_module(sys.argv[1])
    torch.set_num_threads(1)
    wanted = sys.argv[2:] or [topic.__name__ for topic in TOPICS]
    results = {topic.__name__: topic(chosen) for topic in TOPICS if topic.__name__ in wanted}
    print("RESULT" + json.dumps(results))
