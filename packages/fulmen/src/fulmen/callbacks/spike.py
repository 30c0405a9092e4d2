"""SpikeDetection: ends a fit whose loss jumps, and writes down which batches to leave out next time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from fulmen._loss_weights import per_weight
from fulmen.callbacks._loss import loss_among
from fulmen.callbacks.callback import Callback
from fulmen_fabric import SpikeDetection as Detector
from fulmen_fabric import TrainingSpikeException

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["SpikeDetection", "TrainingSpikeException"]


class SpikeDetection(Callback):
    """Raises ``TrainingSpikeException`` on every rank when the loss of any rank jumps, before the next batch.

    A loss is a spike if it is worse than the one before, and further from the mean of the last ``window`` losses than
    both tolerances allow. The batch and the one before it, which may have spoilt the weights, are written to a JSON
    file as a list of indices, for your loader to leave out when training goes on from a checkpoint.

    To be in time it must know each loss: it reads one number from the device after **every** batch, for which the host
    waits, and with several ranks adds a collective of one number. No other callback does that.

    Args:
        mode: whether a loss is better the smaller (``"min"``) or the larger (``"max"``) it is.
        window: losses of which the mean is taken.
        warmup: batches at the start of an epoch that are not judged.
        atol: distance from the mean from which on a worse loss is a spike. None: only ``rtol`` counts.
        rtol: the same as a multiple of the mean. None: only ``atol`` counts.
        exclude_batches_path: the file, or a folder for ``skip_batches.json``. None: in ``default_root_dir``.
        finite_only: whether a loss that is not finite is a spike by itself. Otherwise it is only left out of the mean,
            unless it is infinite in the direction that is worse.

    Raises:
        MisconfigurationException: ``mode`` is neither, ``window`` or ``warmup`` is too small.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        self._detector = Detector(mode, window, warmup, atol, rtol, exclude_batches_path, finite_only)
        self._largest: Callable[[int], int] | None = None

    @property
    def bad_batches(self) -> list[int]:
        """Batches to leave out, as they are written to the file."""
        return self._detector.bad_batches

    @property
    def exclude_batches_path(self) -> str | None:
        """The file; before a spike what was given."""
        return self._detector.exclude_batches_path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how to ask the other ranks."""
        if trainer.world_size == 1:
            self._largest = None
            return
        reduce, device = trainer.strategy.reduce, trainer.strategy.root_device

        def largest(verdict: int) -> int:
            # Once per batch, see the class.
            return int(reduce(torch.tensor(verdict, device=device), reduce_op="max").item())

        self._largest = largest

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the batch's loss.

        Raises:
            TrainingSpikeException: it is a spike here or on another rank.
            MisconfigurationException: ``training_step`` returned something that has no loss.
        """
        self._detector.judge(
            loss_among(per_weight(trainer, outputs), "SpikeDetection"),
            batch_idx,
            largest=self._largest,
            folder=trainer.default_root_dir,
            writes=trainer.is_global_zero,
        )

    def state_dict(self) -> dict[str, Any]:
        """The settings, the bad batches and the losses of the mean, as plain data."""
        return self._detector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._detector.load_state_dict(state_dict)
