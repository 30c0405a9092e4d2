"""BasePredictionWriter: what to do with predictions, knowing which samples they are of."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from fulmen.callbacks.callback import Callback
from fulmen_protocols import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["BasePredictionWriter", "WriteInterval"]


class WriteInterval(StrEnum):
    """When predictions are written."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """Whether after every batch."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether after the last batch, all together."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Base of callbacks that write predictions: override ``write_on_batch_end``, ``write_on_epoch_end``, or both.

    Every rank writes its own predictions. Over all ranks each sample of a ``DataLoader`` is predicted exactly once, and
    the indices tell which it is in the data set. ``trainer.predict(return_predictions=False)`` keeps no predictions
    unless they are written at the end of the epoch.

    Args:
        write_interval: ``"batch"``, ``"epoch"`` or ``"batch_and_epoch"``.

    Raises:
        MisconfigurationException: ``write_interval`` is none of these, or, when ``trainer.predict`` starts, the method
            that it needs is not overridden.
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        allowed = [interval.value for interval in WriteInterval]
        if write_interval not in allowed:
            raise MisconfigurationException(
                f"{type(self).__name__}(write_interval={write_interval!r}): it is one of {allowed!r}."
                f"{did_you_mean(str(write_interval), allowed)}"
            )
        self.interval = WriteInterval(write_interval)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to call."""
        if stage != "predict":
            return
        needed = {"write_on_batch_end": self.interval.on_batch, "write_on_epoch_end": self.interval.on_epoch}
        for name, is_needed in needed.items():
            if is_needed and getattr(type(self), name) is getattr(BasePredictionWriter, name):
                raise MisconfigurationException(
                    f"{type(self).__name__}(write_interval={self.interval.value!r}) does not override {name}. "
                    "Define it, or choose another write_interval."
                )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the predictions of one batch.

        Args:
            trainer: whose run this is.
            pl_module: what predicts.
            prediction: what ``predict_step`` returned, on its device.
            batch_indices: positions of the batch's samples in the data set; None where the loader has no indices (an
                iterable data set, a loader of the user's own kind).
            batch: what was predicted on.
            batch_idx: its index among this rank's batches of this loader.
            dataloader_idx: index of the loader.
        """
        raise NotImplementedError(f"{type(self).__name__}.write_on_batch_end")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the predictions of all batches of this rank.

        Args:
            trainer: whose run this is.
            pl_module: what predicts.
            predictions: by batch; with several loaders by loader, then by batch. They are on the CPU.
            batch_indices: by loader, then by batch, then by sample, also where there is one loader; empty for a loader
                that has no indices.
        """
        raise NotImplementedError(f"{type(self).__name__}.write_on_epoch_end")

    @property
    def _on_predict_batch_end_is_idle(self) -> bool:
        own = type(self).on_predict_batch_end is BasePredictionWriter.on_predict_batch_end
        return own and not self.interval.on_batch

    @property
    def _on_predict_epoch_end_is_idle(self) -> bool:
        own = type(self).on_predict_epoch_end is BasePredictionWriter.on_predict_epoch_end
        return own and not self.interval.on_epoch

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch."""
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        if self.interval.on_epoch:
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)
