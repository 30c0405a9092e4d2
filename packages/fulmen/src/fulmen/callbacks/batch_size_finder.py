"""BatchSizeFinder: the largest batch that fits, found at the beginning of a call, or of chosen epochs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from fulmen.callbacks._finder import refuse_second, searching
from fulmen.callbacks.callback import Callback
from fulmen.states import TrainerFn
from fulmen.tuner.batch_size_scaling import MODES, check_arguments, check_run, scale_batch_size

if TYPE_CHECKING:
    from fulmen.callbacks.callback import Stage
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["BatchSizeFinder"]


class BatchSizeFinder(Callback):
    """Finds the largest batch size that fits into memory at the start of a call, and goes on with it.

    It tries sizes in ``fit``, ``validate``, ``test`` and ``predict``. To search at chosen epochs, or for some calls
    only, derive from it, override the hooks that should not search, and call ``self.scale_batch_size(trainer,
    pl_module)`` in one of your own: ``on_train_epoch_start``, or the start of a call.

    Args:
        mode: ``"power"`` doubles until memory runs out; ``"binsearch"`` goes on by bisection.
        steps_per_trial: how many steps a size is tried for.
        init_val: the size to begin with.
        max_trials: sizes that fit, after which to stop.
        batch_arg_name: the attribute of the module, the datamodule or their ``hparams`` from which loaders take their
            batch size.
        margin: with ``"binsearch"``, the share by which the found size is lowered.
        max_val: the largest size to try. Nor is a size tried that is larger than the data set.

    Attributes:
        optimal_batch_size: what was found; ``init_val`` before, None under ``fast_dev_run``.

    Raises:
        MisconfigurationException: an argument is wrong.
    """

    SUPPORTED_MODES = MODES
    runs_first: ClassVar[bool] = True
    """What it finds must be in place before other callbacks look at the run."""

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        mode = mode.lower()
        check_arguments(
            mode=mode,
            steps_per_trial=steps_per_trial,
            init_val=init_val,
            max_trials=max_trials,
            margin=margin,
            max_val=max_val,
        )
        self.optimal_batch_size: int | None = init_val
        self._batch_arg_name = batch_arg_name
        self._search = partial(
            scale_batch_size,
            mode=mode,
            steps_per_trial=steps_per_trial,
            init_val=init_val,
            max_trials=max_trials,
            batch_arg_name=batch_arg_name,
            margin=margin,
            max_val=max_val,
        )
        self._early_exit = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Refuse a run of which no batch size can be found, and a second finder."""
        refuse_second(BatchSizeFinder, trainer)
        if not trainer.fast_dev_run:
            check_run(trainer, pl_module, self._batch_arg_name)

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search now, between two epochs of a fit or at the start of an evaluation; sets ``optimal_batch_size``."""
        with searching(ends_the_call=self._early_exit):
            self.optimal_batch_size = self._search(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search before anything is trained."""
        self.scale_batch_size(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search before ``trainer.validate`` begins; not inside of fit."""
        if trainer.state.fn is TrainerFn.VALIDATING:
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search before ``trainer.test`` begins."""
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search before ``trainer.predict`` begins."""
        self.scale_batch_size(trainer, pl_module)
