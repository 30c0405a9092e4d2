"""GradientAccumulationScheduler: another number of batches per optimizer step from chosen epochs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fulmen.callbacks._requirements import require_no_engine
from fulmen.callbacks.callback import Callback
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen.callbacks.callback import Stage
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["GradientAccumulationScheduler"]


class GradientAccumulationScheduler(Callback):
    """Set ``trainer.accumulate_grad_batches`` by the epoch: ``{4: 2}`` steps on two batches from epoch 4 on.

    The Trainer's own ``accumulate_grad_batches`` stays 1, and is 1 again when training has ended. As with that flag,
    an ``optimizer_step`` or ``optimizer_zero_grad`` of the module is called once per optimizer step, not per batch.

    Args:
        scheduling: the first epoch, counted from 0, that has this number of batches per optimizer step. Before the
            first entry it is 1.

    Raises:
        MisconfigurationTypeError: ``scheduling`` is empty or no mapping.
        MisconfigurationException: an epoch or a number of batches is out of range.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        _check(scheduling)
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._is_training = False

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Batches per optimizer step in ``epoch``."""
        return self.scheduling[max(begin for begin in self.epochs if begin <= epoch)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Refuse what would contradict the schedule.

        Raises:
            MisconfigurationException: manual optimization, the Trainer's own accumulation, or a strategy whose engine
                accumulates.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"GradientAccumulationScheduler(scheduling={self.scheduling!r}) accumulates by itself, and "
                f"{type(pl_module).__name__} has automatic_optimization=False. Drop the callback, and step every so "
                "many batches in training_step."
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and "
                f"GradientAccumulationScheduler(scheduling={self.scheduling!r}) both say how many batches there are to "
                "an optimizer step. Drop one of the two."
            )
        require_no_engine(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run may begin in the middle of an epoch."""
        self._is_training = True
        self._set(trainer, self.get_accumulate_grad_batches(trainer.current_epoch))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the number of this epoch."""
        self._set(trainer, self.get_accumulate_grad_batches(trainer.current_epoch))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the Trainer as it was."""
        self._is_training = False
        self._set(trainer, 1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was."""
        if self._is_training:
            self.on_train_end(trainer, pl_module)

    @staticmethod
    def _set(trainer: Trainer, factor: int) -> None:
        if trainer.accumulate_grad_batches != factor:
            trainer.accumulate_grad_batches = factor


def _check(scheduling: object) -> None:
    if not isinstance(scheduling, dict) or not scheduling:
        raise MisconfigurationTypeError(
            f"GradientAccumulationScheduler(scheduling={scheduling!r}): give a dict {{epoch: batches}} with at least "
            "one entry."
        )
    for epoch, factor in cast("dict[object, object]", scheduling).items():
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise MisconfigurationException(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}) has the epoch {epoch!r}: epochs are "
                "integers, the first is 0."
            )
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise MisconfigurationException(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}) has {factor!r} batches from epoch {epoch} "
                "on: give an integer of at least 1."
            )
