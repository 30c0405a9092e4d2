"""Callback: any object with some of these hook methods. Names and arguments are Lightning's.

Checked by name when a run is assembled: a misspelt hook is an error with the nearest name, a hook nobody defines costs
nothing.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["HOOKS", "Callback"]

HOOKS: dict[str, tuple[str, ...]] = {
    "setup": ("stage",),
    "teardown": ("stage",),
    "on_fit_start": (),
    "on_fit_end": (),
    "on_sanity_check_start": (),
    "on_sanity_check_end": (),
    "on_train_start": (),
    "on_train_end": (),
    "on_train_epoch_start": (),
    "on_train_epoch_end": (),
    "on_train_batch_start": ("batch", "batch_idx"),
    "on_train_batch_end": ("outputs", "batch", "batch_idx"),
    "on_validation_start": (),
    "on_validation_end": (),
    "on_validation_epoch_start": (),
    "on_validation_epoch_end": (),
    "on_validation_batch_start": ("batch", "batch_idx", "dataloader_idx"),
    "on_validation_batch_end": ("outputs", "batch", "batch_idx", "dataloader_idx"),
    "on_test_start": (),
    "on_test_end": (),
    "on_test_epoch_start": (),
    "on_test_epoch_end": (),
    "on_test_batch_start": ("batch", "batch_idx", "dataloader_idx"),
    "on_test_batch_end": ("outputs", "batch", "batch_idx", "dataloader_idx"),
    "on_predict_start": (),
    "on_predict_end": (),
    "on_predict_epoch_start": (),
    "on_predict_epoch_end": (),
    "on_predict_batch_start": ("batch", "batch_idx", "dataloader_idx"),
    "on_predict_batch_end": ("outputs", "batch", "batch_idx", "dataloader_idx"),
    "on_before_zero_grad": ("optimizer",),
    "on_before_backward": ("loss",),
    "on_after_backward": (),
    "on_before_optimizer_step": ("optimizer",),
    "on_exception": ("exception",),
    "on_save_checkpoint": ("checkpoint",),
    "on_load_checkpoint": ("checkpoint",),
}
"""Every hook of a callback, with its arguments after ``(trainer, pl_module)``."""


@runtime_checkable
class Callback(Protocol):
    """Any object: every hook of ``HOOKS`` is optional, as are ``state_dict``, ``load_state_dict`` and ``state_key``."""
