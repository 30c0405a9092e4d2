"""Tuner: find a learning rate or a batch size before training, in a call of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.batch_size_finder import BatchSizeFinder
from fulmen.callbacks.lr_finder import LearningRateFinder
from fulmen_fabric import isolate_rng
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Generator

    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.tuner.lr_finder import _LRFinder  # pyright: ignore[reportPrivateUsage]  # Lightning's name

__all__ = ["Tuner"]

_METHODS = ("fit", "validate", "test", "predict")


class Tuner:
    """Tunes a module with a Trainer. Afterwards both are as before, but for the value that was found.

    Args:
        trainer: whose devices, precision and settings the trials use; its other callbacks and its loggers hear nothing
            of them, but for ``setup`` and ``teardown``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def scale_batch_size(
        self,
        model: LightningModule,
        train_dataloaders: object = None,
        val_dataloaders: object = None,
        dataloaders: object = None,
        datamodule: LightningDataModule | None = None,
        method: str = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Find the largest batch size that fits into memory, and write it into the attribute that loaders take it from.

        A trial of ``fit`` is ``steps_per_trial`` optimizer steps, then as many batches of validation.

        Args:
            model: what to run. It, the datamodule or their ``hparams`` have the attribute ``batch_arg_name``.
            train_dataloaders: refused: a loader's batch size cannot be changed. A datamodule is taken.
            val_dataloaders: passed on to ``fit``; the batch size of such a loader stays.
            dataloaders: refused like ``train_dataloaders``, for the other methods.
            datamodule: makes the loaders.
            method: what to try: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
            mode: ``"power"`` doubles until memory runs out; ``"binsearch"`` goes on by bisection.
            steps_per_trial: how many steps a size is tried for.
            init_val: the size to begin with.
            max_trials: sizes that fit, after which to stop.
            batch_arg_name: the attribute's name.
            margin: with ``"binsearch"``, the share by which the found size is lowered.
            max_val: the largest size to try. Nor is a size tried that is larger than the data set.

        Returns:
            The size; None under ``fast_dev_run``.

        Raises:
            MisconfigurationException: an argument is wrong, the run has several processes, or the Trainer has a
                ``BatchSizeFinder`` of its own.
        """
        _check_loaders(train_dataloaders, val_dataloaders, dataloaders, method)
        self._refuse_second(BatchSizeFinder)
        finder = BatchSizeFinder(
            mode=mode,
            steps_per_trial=steps_per_trial,
            init_val=init_val,
            max_trials=max_trials,
            batch_arg_name=batch_arg_name,
            margin=margin,
            max_val=max_val,
        )
        if self._trainer.fast_dev_run:
            rank_zero_warn("fast_dev_run is on: no batch size is searched.")
            return None
        with self._with_finder(finder, model):
            if method == "fit":
                self._trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
            else:
                getattr(self._trainer, method)(model, dataloaders, datamodule=datamodule)
        return finder.optimal_batch_size

    def lr_find(
        self,
        model: LightningModule,
        train_dataloaders: object = None,
        val_dataloaders: object = None,
        dataloaders: object = None,
        datamodule: LightningDataModule | None = None,
        method: str = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
        weights_only: bool | None = None,
    ) -> _LRFinder | None:
        """Train on ever larger learning rates, and suggest the one at which the loss fell fastest.

        Args:
            model: what to train, with one optimizer.
            train_dataloaders: as for ``fit``.
            val_dataloaders: as for ``fit``; no validation is run.
            dataloaders: must be None.
            datamodule: as for ``fit``.
            method: must be ``"fit"``.
            min_lr: the first learning rate.
            max_lr: the last one.
            num_training: how many optimizer steps it takes from one to the other.
            mode: how it rises, ``"exponential"`` or ``"linear"``.
            early_stop_threshold: end when the smoothed loss is so many times the best one; None: never.
            update_attr: write the suggestion into the module, the datamodule and their ``hparams``.
            attr_name: where to write it; by default ``lr`` or ``learning_rate``.
            weights_only: has no effect: state is kept in memory, and no file is read.

        Returns:
            The curve, which suggests and plots; None under ``fast_dev_run``.

        Raises:
            MisconfigurationException: an argument is wrong, there is not exactly one optimizer, nobody has the
                attribute, or the Trainer has a ``LearningRateFinder`` of its own.
        """
        if method != "fit":
            raise MisconfigurationException(f"method={method!r}: only method='fit' trains, so lr_find needs that one.")
        _check_loaders(train_dataloaders, val_dataloaders, dataloaders, method)
        self._refuse_second(LearningRateFinder)
        finder = LearningRateFinder(
            min_lr=min_lr,
            max_lr=max_lr,
            num_training_steps=num_training,
            mode=mode,
            early_stop_threshold=early_stop_threshold,
            update_attr=update_attr,
            attr_name=attr_name,
        )
        if self._trainer.fast_dev_run:
            rank_zero_warn("fast_dev_run is on: no learning rate is searched.")
            return None
        with self._with_finder(finder, model):
            self._trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
        return finder.optimal_lr

    def _refuse_second(self, kind: type[Any]) -> None:
        if self._trainer.world.runs_apart:
            raise MisconfigurationException(
                f"the Tuner was used with strategy {self._trainer.assembly.strategy_name!r}, whose processes end with "
                "what they have found. Tune on one device, or in a script with strategy='ddp'."
            )
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            raise MisconfigurationException(
                f"the Trainer's callbacks hold a {kind.__name__}, and the Tuner brings its own. Remove one of the two."
            )

    @contextmanager
    def _with_finder(self, finder: BatchSizeFinder | LearningRateFinder, model: Any) -> Generator[None]:
        """Within the block ``finder`` is the first callback, and a call ends when it has found something.

        What is drawn at random in it is not missed later.
        """
        finder._early_exit = True  # pyright: ignore[reportPrivateUsage]  # Lightning's name
        callbacks = self._trainer.callbacks
        callbacks.insert(0, finder)
        modes = [(each, each.training) for each in model.modules()] if hasattr(model, "modules") else []
        try:
            with isolate_rng():
                yield
        finally:
            callbacks[:] = [callback for callback in callbacks if callback is not finder]
            for each, training in modes:
                each.training = training


def _check_loaders(train: object, val: object, others: object, method: str) -> None:
    if method not in _METHODS:
        raise MisconfigurationException(f"method={method!r} must be one of {', '.join(map(repr, _METHODS))}.")
    if method == "fit" and others is not None:
        raise MisconfigurationException(
            "dataloaders was given with method='fit', which takes train_dataloaders and val_dataloaders instead."
        )
    if method != "fit" and (train is not None or val is not None):
        given = "train_dataloaders" if train is not None else "val_dataloaders"
        raise MisconfigurationException(f"{given} was given with method={method!r}, which takes dataloaders instead.")
