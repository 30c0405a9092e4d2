"""The Trainer's settings as users see them: under Lightning's names, some of them settable during a run.

Setting one that changes the run (``accumulate_grad_batches``, ``max_epochs``, ``limit_*``, ...) makes the loop take up
a new plan after the batch in hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datetime import timedelta

    from fulmen.progress import Progress
    from fulmen.settings import BatchLimit, Settings

__all__ = ["SettingsSurface"]


class SettingsSurface:
    """Properties over ``settings``."""

    settings: Settings
    _progress: Progress

    def _set(self, **changes: Any) -> None:
        self.settings = replace(self.settings, **changes)
        self._progress.replan = True

    @property
    def max_epochs(self) -> int:
        """Epochs after which training ends; -1: no limit. Settable."""
        return self.settings.max_epochs

    @max_epochs.setter
    def max_epochs(self, value: int) -> None:
        self._set(max_epochs=value, max_epochs_is_default=False)

    @property
    def min_epochs(self) -> int:
        """Epochs before which nobody can stop training. Settable."""
        return self.settings.min_epochs

    @min_epochs.setter
    def min_epochs(self, value: int) -> None:
        self._set(min_epochs=value)

    @property
    def max_steps(self) -> int:
        """Optimizer steps after which training ends; -1: no limit. Settable."""
        return self.settings.max_steps

    @max_steps.setter
    def max_steps(self, value: int) -> None:
        self._set(max_steps=value)

    @property
    def min_steps(self) -> int:
        """Optimizer steps before which nobody can stop training."""
        return self.settings.min_steps

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches per optimizer step. Settable during a run; the loop takes it up after the batch in hand."""
        return self.settings.accumulate_grad_batches

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, value: int) -> None:
        self._set(accumulate_grad_batches=value)

    @property
    def loss_weighting(self) -> Literal["mean", "weights"]:
        """Whether losses are means, or sums with their weights beside them."""
        return self.settings.loss_weighting

    @property
    def gradient_clip_val(self) -> float | None:
        """Clipping threshold. Settable."""
        return self.settings.gradient_clip_val

    @gradient_clip_val.setter
    def gradient_clip_val(self, value: float | None) -> None:
        self._set(gradient_clip_val=value)

    @property
    def gradient_clip_algorithm(self) -> str:
        """``norm`` or ``value``."""
        return self.settings.gradient_clip_algorithm

    @property
    def log_every_n_steps(self) -> int:
        """Optimizer-stepping batches between rows of the loggers; 0: never. Settable."""
        return self.settings.log_every_n_steps

    @log_every_n_steps.setter
    def log_every_n_steps(self, value: int) -> None:
        self._set(log_every_n_steps=value)

    @property
    def limit_train_batches(self) -> BatchLimit:
        """How much of the training loader to use. Settable before a call."""
        return self.settings.limit_train_batches

    @limit_train_batches.setter
    def limit_train_batches(self, value: BatchLimit) -> None:
        self._set(limit_train_batches=value)

    @property
    def limit_val_batches(self) -> BatchLimit:
        """How much of the validation loaders to use. Settable before a call."""
        return self.settings.limit_val_batches

    @limit_val_batches.setter
    def limit_val_batches(self, value: BatchLimit) -> None:
        self._set(limit_val_batches=value)

    @property
    def limit_test_batches(self) -> BatchLimit:
        """How much of the test loaders to use. Settable before a call."""
        return self.settings.limit_test_batches

    @limit_test_batches.setter
    def limit_test_batches(self, value: BatchLimit) -> None:
        self._set(limit_test_batches=value)

    @property
    def limit_predict_batches(self) -> BatchLimit:
        """How much of the prediction loaders to use. Settable before a call."""
        return self.settings.limit_predict_batches

    @limit_predict_batches.setter
    def limit_predict_batches(self, value: BatchLimit) -> None:
        self._set(limit_predict_batches=value)

    @property
    def val_check_interval(self) -> int | float | timedelta:
        """Between validations: batches, a fraction of the epoch, or a duration. Settable."""
        return self.settings.val_check_interval

    @val_check_interval.setter
    def val_check_interval(self, value: int | float | timedelta) -> None:
        self._set(val_check_interval=value)

    @property
    def check_val_every_n_epoch(self) -> int | None:
        """Epochs between epochs with validation; None: intervals count across epochs. Settable."""
        return self.settings.check_val_every_n_epoch

    @check_val_every_n_epoch.setter
    def check_val_every_n_epoch(self, value: int | None) -> None:
        self._set(check_val_every_n_epoch=value)

    @property
    def num_sanity_val_steps(self) -> float:
        """Validation batches tried before training; ``inf``: all."""
        return self.settings.num_sanity_val_steps

    @property
    def overfit_batches(self) -> BatchLimit:
        """How much of the data to overfit on; 0: off."""
        return self.settings.overfit_batches

    @property
    def reload_dataloaders_every_n_epochs(self) -> int:
        """Epochs after which loaders are asked for anew; 0: never."""
        return self.settings.reload_dataloaders_every_n_epochs

    @property
    def barebones(self) -> bool:
        """Whether everything but training is off."""
        return self.settings.barebones

    @property
    def enable_autolog_hparams(self) -> bool:
        """Whether loggers are told what ``save_hyperparameters`` recorded."""
        return self.settings.enable_autolog_hparams

    @property
    def default_root_dir(self) -> str:
        """Where logs and checkpoints go unless a logger says otherwise."""
        return self.settings.default_root_dir
