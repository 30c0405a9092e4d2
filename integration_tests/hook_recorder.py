"""Records the order in which a Trainer calls the hooks of a module, a datamodule and a callback.

Run as a script it prints the order as JSON: ``python hook_recorder.py LIBRARY SCENARIO``, where LIBRARY is a package
with Lightning's names. That is how two libraries are compared: each in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

MODULE_HOOKS = [
    "prepare_data", "setup", "teardown", "configure_model", "configure_optimizers", "configure_callbacks",
    "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_train_batch_start", "on_train_batch_end", "training_step", "validation_step", "test_step", "predict_step",
    "on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_model_eval", "on_validation_model_train",
    "on_validation_model_zero_grad", "on_test_start", "on_test_end", "on_test_epoch_start", "on_test_epoch_end",
    "on_test_batch_start", "on_test_batch_end", "on_test_model_eval", "on_test_model_train", "on_predict_start",
    "on_predict_end", "on_predict_epoch_start", "on_predict_epoch_end", "on_predict_batch_start",
    "on_predict_batch_end", "on_predict_model_eval", "on_before_zero_grad", "on_before_backward", "backward",
    "on_after_backward", "on_before_optimizer_step", "optimizer_step", "optimizer_zero_grad",
    "configure_gradient_clipping", "lr_scheduler_step", "on_before_batch_transfer", "transfer_batch_to_device",
    "on_after_batch_transfer", "on_save_checkpoint", "on_load_checkpoint", "train_dataloader", "val_dataloader",
    "test_dataloader", "predict_dataloader",
]  # fmt: skip
CALLBACK_HOOKS = [
    "setup", "teardown", "on_fit_start", "on_fit_end", "on_sanity_check_start", "on_sanity_check_end",
    "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start",
    "on_train_batch_end", "on_validation_start", "on_validation_end", "on_validation_epoch_start",
    "on_validation_epoch_end", "on_validation_batch_start", "on_validation_batch_end", "on_test_start", "on_test_end",
    "on_test_epoch_start", "on_test_epoch_end", "on_test_batch_start", "on_test_batch_end", "on_predict_start",
    "on_predict_end", "on_predict_epoch_start", "on_predict_epoch_end", "on_predict_batch_start",
    "on_predict_batch_end", "on_exception", "state_dict", "load_state_dict", "on_save_checkpoint",
    "on_load_checkpoint", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad",
]  # fmt: skip
DATAMODULE_HOOKS = [
    "prepare_data", "setup", "teardown", "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
    "state_dict", "load_state_dict", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
]  # fmt: skip


def recording(base: type, hooks: list[str], who: str, calls: list[str]) -> type:
    """A subclass of ``base`` whose ``hooks`` note that they are called and then do what ``base`` does."""
    methods: dict[str, Any] = {}
    for name in hooks:
        original = getattr(base, name)

        def method(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls.append(f"{who}.{_name}")
            return _original(self, *args, **kwargs)

        methods[name] = method
    return type(base.__name__, (base,), methods)


class Toggle:
    """What one scenario turns on."""

    manual = False
    scheduler = False
    skip_epoch = False
    several_val = False


def module_class(library: Any, toggle: Toggle) -> type:
    class Module(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.automatic_optimization = not toggle.manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).sum()
            if not toggle.manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.layer(batch)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if toggle.skip_epoch and batch_idx == 1 else None

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            if not toggle.scheduler:
                return optimizer
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def _loader(self) -> Any:
            return DataLoader(torch.randn(6, 4), batch_size=2)

        train_dataloader = test_dataloader = predict_dataloader = _loader

        def val_dataloader(self) -> Any:
            return [self._loader(), self._loader()] if toggle.several_val else self._loader()

    return Module


class DataModuleSource:
    """Builds a datamodule class with loaders of its own."""

    @staticmethod
    def of(library: Any) -> type:
        class Data(library.LightningDataModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
            def _loader(self) -> Any:
                return DataLoader(torch.randn(6, 4), batch_size=2)

            train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader

        return Data


def run(library_name: str, scenario: str, **more: Any) -> list[str]:
    """The calls of one scenario, in order; ``more`` are arguments of its Trainers."""
    library = importlib.import_module(library_name)
    calls: list[str] = []
    toggle = Toggle()
    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, **more}
    datamodule = None
    if scenario == "manual":
        toggle.manual = True
    if scenario in ("scheduler", "clipping"):
        toggle.scheduler = True
    if scenario == "clipping":
        options["gradient_clip_val"] = 0.5
    if scenario == "skip_epoch":
        toggle.skip_epoch = toggle.scheduler = True
        options["limit_train_batches"] = 3
    if scenario == "several_val":
        toggle.several_val = True
    if scenario == "accumulation":
        options.update(accumulate_grad_batches=2, limit_train_batches=3)
    if scenario == "interval":
        options.update(val_check_interval=1, num_sanity_val_steps=0)
    if scenario == "two_epochs":
        options.update(max_epochs=2, check_val_every_n_epoch=2)
    if scenario == "max_steps":
        options.update(max_epochs=-1, max_steps=3)
    if scenario == "zero_epochs":
        options.update(max_epochs=0)
    if scenario == "datamodule":
        datamodule = recording(DataModuleSource.of(library), DATAMODULE_HOOKS, "datamodule", calls)()
    callback = recording(library.Callback, CALLBACK_HOOKS, "callback", calls)()
    module = recording(module_class(library, toggle), MODULE_HOOKS, "module", calls)()

    with tempfile.TemporaryDirectory() as folder:
        trainer = library.Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        )
        if scenario in ("validate", "test", "predict"):
            getattr(trainer, scenario)(module)
            return calls
        trainer.fit(module, datamodule=datamodule)
        if scenario == "save_and_resume":
            trainer.save_checkpoint(f"{folder}/here.ckpt")
            calls.append("-- resumed --")
            again = library.Trainer(
                accelerator="cpu",
                default_root_dir=folder,
                callbacks=[callback],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                **{**options, "max_epochs": 2},
            )
            again.fit(module, ckpt_path=f"{folder}/here.ckpt")
        if scenario == "fit_then_test":
            trainer.test(module)
    return calls


SCENARIOS = [
    "plain", "scheduler", "clipping", "manual", "accumulation", "interval", "two_epochs", "max_steps", "zero_epochs",
    "skip_epoch", "several_val", "datamodule", "validate", "test", "predict", "fit_then_test", "save_and_resume",
]  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    wanted = SCENARIOS if sys.argv[2] == "all" else [sys.argv[2]]
    print("ORDER" + json.dumps({scenario: run(sys.argv[1], scenario) for scenario in wanted}))
