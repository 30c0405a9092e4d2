"""LearningRateFinder: a range test at the beginning of a fit, or of chosen epochs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from fulmen.callbacks._finder import refuse_second, searching
from fulmen.callbacks.callback import Callback
from fulmen.tuner.lr_finder import MODES, check_arguments, lr_find

if TYPE_CHECKING:
    from fulmen.callbacks.callback import Stage
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.tuner.lr_finder import _LRFinder  # pyright: ignore[reportPrivateUsage]

__all__ = ["LearningRateFinder"]


class LearningRateFinder(Callback):
    """Finds a learning rate at the start of ``fit`` and trains with it.

    The range test leaves nothing behind but the learning rate. To test at chosen epochs, derive from it, override
    ``on_fit_start`` to do nothing, and call ``self.lr_find(trainer, pl_module)`` in ``on_train_epoch_start``.

    Args:
        min_lr: the first learning rate.
        max_lr: the last one.
        num_training_steps: how many optimizer steps it takes from one to the other.
        mode: how it rises, ``"exponential"`` or ``"linear"``.
        early_stop_threshold: end when the smoothed loss is so many times the best one; None: never.
        update_attr: write the suggestion into the module, the datamodule, their ``hparams`` and the optimizer.
        attr_name: where to write it; by default ``lr`` or ``learning_rate``.

    Attributes:
        optimal_lr: what the last test found; None before, and under ``fast_dev_run``.

    Raises:
        MisconfigurationException: an argument is wrong.
    """

    SUPPORTED_MODES = MODES
    runs_first: ClassVar[bool] = True
    """What it finds must be in place before other callbacks look at the run."""

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        mode = mode.lower()
        check_arguments(
            min_lr=min_lr,
            max_lr=max_lr,
            num_training=num_training_steps,
            mode=mode,
            early_stop_threshold=early_stop_threshold,
        )
        self._search = partial(
            lr_find,
            min_lr=min_lr,
            max_lr=max_lr,
            num_training=num_training_steps,
            mode=mode,
            early_stop_threshold=early_stop_threshold,
            update_attr=update_attr,
            attr_name=attr_name,
        )
        self._early_exit = False
        self.optimal_lr: _LRFinder | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Refuse a second finder."""
        refuse_second(LearningRateFinder, trainer)

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test now, between two epochs of the running fit; ``optimal_lr`` holds what was found."""
        with searching(ends_the_call=self._early_exit):
            self.optimal_lr = self._search(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test before anything is trained."""
        self.lr_find(trainer, pl_module)
