"""When bars are opened, drawn and closed; what they look like is left to the subclass."""

from __future__ import annotations

import math
from abc import abstractmethod
from time import monotonic
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.progress._bars import Bar, PlainBar
from fulmen.callbacks.progress.progress_bar import ProgressBar
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["DrawnProgressBar"]

_REDRAW_S = 0.1
_PLAIN_REDRAW_S = 1.0
"""Lines without a terminal come every ten seconds: their numbers need not be fresher than this."""
_SHARE = 50
"""Drawing may take one part in so many of the time: a slow terminal is drawn on less often."""
_BURST = 30
"""Drawings at the ends of epochs and loaders that may follow each other without a pause."""


class DrawnProgressBar(ProgressBar):
    """Draws at most ten times a second, whatever the batches' pace, from numbers that have reached the host.

    A batch at which nothing is drawn costs one look at the clock. Nothing here waits for a device.

    Args:
        refresh_rate: in the subclass's unit; 0: never draw.
        leave: keep the bar of every epoch on screen.
        every: draw only at every so many batches.
        at_most_per_s: draw no more often than this, however fast the terminal is.

    Raises:
        MisconfigurationException: ``refresh_rate`` is negative.
    """

    def __init__(
        self, refresh_rate: float, leave: bool, *, every: int = 1, at_most_per_s: float = 1 / _REDRAW_S
    ) -> None:
        super().__init__()
        if refresh_rate < 0:
            raise MisconfigurationException(
                f"{type(self).__name__}(refresh_rate={refresh_rate!r}) is negative: leave it out to draw as often as "
                "time allows, or use 0 for no bar."
            )
        self._refresh_rate = refresh_rate
        self._every = every
        self._redraw_s = max(_REDRAW_S, 1 / at_most_per_s) if at_most_per_s > 0 else math.inf
        self._leave = leave
        self._enabled = True
        self._due = 0.0 if refresh_rate else math.inf
        self._spare, self._counted = float(_BURST), monotonic()
        self._unsaid = False
        self._number = self._eval_number = 0
        self._train_bar: Bar | None = None
        self._eval_bar: Bar | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open bars hold locks and terminals, which no other process can have.
        return {**self.__dict__, "_train_bar": None, "_eval_bar": None, "_trainer": None}

    @property
    def is_enabled(self) -> bool:
        """Whether it draws."""
        return self._enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether it does not draw."""
        return not self.is_enabled

    def disable(self) -> None:
        """Draw nothing from now on."""
        self._enabled = False
        self._due = math.inf

    def enable(self) -> None:
        """Draw from now on."""
        self._enabled = True
        self._due = self._soon()

    @abstractmethod
    def _open(self, stage: str) -> Bar:
        """A new bar for ``"train"``, ``"sanity"``, ``"validate"``, ``"test"`` or ``"predict"``."""

    def _finish(self) -> None:
        """Called when no bar is left."""

    def _soon(self) -> float:
        """Draw at the next batch, if at all."""
        return 0.0 if self.is_enabled else math.inf

    def _may_draw(self, times: int) -> bool:
        """Whether the end of an epoch or a loader is drawn: each at a usual pace, ten a second in a hasty run."""
        now = monotonic()
        self._spare = min(self._spare + (now - self._counted) / self._redraw_s, float(_BURST))
        self._counted = now
        if self._spare < times:
            return False
        self._spare -= times
        return True

    def _draw(self, bar: Bar, number: float | None, metrics: dict[str, Any] | None = None) -> None:
        start = monotonic()
        if number is not None:
            bar.n = number
        if metrics is not None:
            bar.set_postfix(metrics, refresh=False)
        bar.refresh()
        self._unsaid = False
        end = monotonic()
        pause = _PLAIN_REDRAW_S if isinstance(bar, PlainBar) else self._redraw_s
        self._due = end + max(pause, _SHARE * (end - start))

    # Training ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of training."""
        if self.is_enabled:
            self._train_bar = self._open("train")
            if trainer.fit_loop.epoch_progress.current.started > trainer.current_epoch:
                self._begin_epoch(trainer)  # resumed inside of it, so that nobody says that it starts

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar anew."""
        if self.is_enabled:
            self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: Trainer) -> None:
        if self._train_bar is None or (self._leave and self._train_bar.n):
            if self._train_bar is not None:
                self._train_bar.close()
            self._train_bar = self._open("train")
        bar = self._train_bar
        bar.reset(_known(self.total_train_batches))
        bar.set_description(f"{self.train_description} {_epoch(trainer)}", refresh=False)
        self._number = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw if it is time."""
        self._number = number = batch_idx + 1
        if monotonic() < self._due:
            return
        if self._train_bar is not None and not number % self._every:
            self._draw(self._train_bar, number, self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole epoch, with its values."""
        bar = self._train_bar
        if bar is None:
            return
        if isinstance(bar, PlainBar):
            self._draw(bar, self._number, self.get_metrics(trainer, pl_module))
            bar.end_epoch()
        elif self._leave or self._may_draw(1):
            self._draw(bar, self._number, self.get_metrics(trainer, pl_module))
        else:
            self._unsaid = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of training, with its last values."""
        if self._train_bar is not None and self._unsaid:
            self._draw(self._train_bar, self._number, self.get_metrics(trainer, pl_module))
        self._close_all()

    # Evaluation --------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of the sanity check at its first batch."""
        self.reset_dataloader_idx_tracker()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of the sanity check."""
        self._close_eval()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar at each loader's first batch."""
        self.reset_dataloader_idx_tracker()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar at each loader's first batch."""
        self.reset_dataloader_idx_tracker()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar at each loader's first batch."""
        self.reset_dataloader_idx_tracker()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time."""
        self._eval_number = batch_idx + 1
        if monotonic() < self._due and dataloader_idx == self._eval_dataloader_idx:
            return
        self._eval_batch("sanity" if trainer.sanity_checking else "validate", batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time."""
        self._eval_number = batch_idx + 1
        if monotonic() < self._due and dataloader_idx == self._eval_dataloader_idx:
            return
        self._eval_batch("test", batch_idx, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time."""
        self._eval_number = batch_idx + 1
        if monotonic() < self._due and dataloader_idx == self._eval_dataloader_idx:
            return
        self._eval_batch("predict", batch_idx, dataloader_idx)

    def _eval_batch(self, stage: str, batch_idx: int, dataloader_idx: int) -> None:
        if not self.is_enabled:
            return
        if self.has_dataloader_changed(dataloader_idx) or self._eval_bar is None:
            # This batch is the new bar's: the old one ended with its total.
            self._close_eval(keep_loader=True)
            if self._train_bar is not None and not self._may_draw(3):  # it opens, it ends, training's goes on
                self._due = monotonic() + self._redraw_s  # a validation that takes longer gets its bar then
                return
            self._eval_bar = bar = self._open(stage)
            bar.total = _known(self._eval_total(stage))
            bar.set_description(self._eval_description(stage, dataloader_idx), refresh=False)
            self._due = 0.0
        bar = self._eval_bar
        if not (batch_idx + 1) % self._every:
            self._draw(bar, batch_idx + 1)

    def _eval_total(self, stage: str) -> float:
        if stage == "test":
            return self.total_test_batches_current_dataloader
        if stage == "predict":
            return self.total_predict_batches_current_dataloader
        return self.total_val_batches_current_dataloader

    def _eval_description(self, stage: str, dataloader_idx: int) -> str:
        description = {
            "sanity": self.sanity_check_description,
            "validate": self.validation_description,
            "test": self.test_description,
            "predict": self.predict_description,
        }[stage]
        return f"{description} DataLoader {dataloader_idx}"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar; what validation logged shows at training's bar."""
        self._close_eval()
        if self._train_bar is not None and not trainer.sanity_checking:
            if self._may_draw(1):
                self._draw(self._train_bar, self._number, self.get_metrics(trainer, pl_module))
            else:
                self._unsaid = True
        elif self._train_bar is None and not trainer.sanity_checking:
            self._finish()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close_all()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close_all()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was found, so that the traceback can be read."""
        self._close_all()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close what is open."""
        self._close_all()

    def _close_eval(self, *, keep_loader: bool = False) -> None:
        bar, self._eval_bar = self._eval_bar, None
        if bar is not None:
            # The last batches may have come too fast to be drawn.
            bar.n = bar.total if keep_loader and bar.total else self._eval_number
            bar.refresh()
            bar.close()
            self._due = self._soon()
        if not keep_loader:
            self.reset_dataloader_idx_tracker()

    def _close_all(self) -> None:
        self._close_eval()
        bar, self._train_bar = self._train_bar, None
        if bar is not None:
            bar.close()
        self._finish()


def _known(total: float) -> int | None:
    return None if total == float("inf") else int(total)


def _epoch(trainer: Trainer) -> str:
    """``3/9``: the epoch, counted from 0, and the last one."""
    last = trainer.max_epochs
    return f"{trainer.current_epoch}/{last - 1}" if last > 0 else str(trainer.current_epoch)
