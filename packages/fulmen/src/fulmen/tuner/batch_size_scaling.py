"""The largest batch size that fits into memory, found by trying."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fulmen.states import TrainerFn
from fulmen.tuner._attributes import find
from fulmen.tuner._snapshot import Snapshot
from fulmen.tuner._trial import (
    Trial,
    progress_of,
    refuse_within_epoch,
    renew_optimizers,
    session_of,
    was_composed,
)
from fulmen.utilities.memory import garbage_collection_cuda, is_oom_error
from fulmen_fabric.rank_zero import rank_zero_info, rank_zero_warn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.tuner._attributes import Attribute

__all__ = ["MODES", "check_arguments", "check_run", "largest", "scale_batch_size"]

MODES = ("power", "binsearch")


def check_arguments(
    *, mode: str, steps_per_trial: int, init_val: int, max_trials: int, margin: float, max_val: int
) -> None:
    """Refuse what cannot be searched with.

    Raises:
        MisconfigurationException: with one sentence for each argument that is wrong.
    """
    wrong: list[str] = []
    if mode not in MODES:
        wrong.append(f"mode={mode!r} must be one of {', '.join(map(repr, MODES))}.")
    counts = {"steps_per_trial": steps_per_trial, "init_val": init_val, "max_trials": max_trials, "max_val": max_val}
    wrong += [f"{name}={value!r} must be at least 1." for name, value in counts.items() if value < 1]
    if not 0.0 <= margin < 1.0:
        wrong.append(f"margin={margin!r} must be at least 0.0 and less than 1.0: the share of the size to leave free.")
    if wrong:
        raise MisconfigurationException("the batch-size finder: " + " ".join(wrong))


def check_run(trainer: Trainer, module: LightningModule, batch_arg_name: str) -> None:
    """Refuse a run of which no batch size can be found. Called when it begins.

    Raises:
        MisconfigurationException: it has several processes, its loaders were passed as arguments, or nobody has the
            attribute.
    """
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"the batch-size finder was used in a run of {trainer.world_size} processes, of which one may run out of "
            "memory while the others wait for it. Find the size with devices=1, then use it for all."
        )
    session = session_of(trainer)
    source = session.sources[session.fn.first_stage.dataloader_prefix]
    if not source.from_hook:
        method = session.fn.value
        argument = "train_dataloaders" if session.fn is TrainerFn.FITTING else "dataloaders"
        raise MisconfigurationException(
            f"the batch-size finder was used with {argument} passed to {method}, where a loader's batch size cannot be "
            f"changed. Define {source.hook} in the module or in a datamodule, with "
            f"batch_size=self.{batch_arg_name}."
        )
    attribute = find([batch_arg_name], module, session.datamodule, flag="batch_arg_name")
    if attribute.is_held_twice and getattr(module, batch_arg_name) != module.hparams[batch_arg_name]:
        rank_zero_warn(
            f"{type(module).__name__}.{batch_arg_name} and its hparams hold different values; the batch-size finder "
            "writes both."
        )


def scale_batch_size(
    trainer: Trainer,
    module: LightningModule,
    *,
    mode: str = "power",
    steps_per_trial: int = 3,
    init_val: int = 2,
    max_trials: int = 25,
    batch_arg_name: str = "batch_size",
    margin: float = 0.05,
    max_val: int = 8192,
) -> int | None:
    """Find the largest batch size that fits, and let the call in hand go on with it.

    A trial of a fit is ``steps_per_trial`` optimizer steps from the same state, then as many batches of validation.

    Args:
        trainer: which is running.
        module: what it runs.
        mode: ``"power"`` doubles until memory runs out; ``"binsearch"`` goes on by bisection.
        steps_per_trial: how long a size is tried. One step leaves out the second one's memory: optimizers make their
            state in the first.
        init_val: the size to begin with.
        max_trials: sizes that fit, after which to stop.
        batch_arg_name: the attribute from which loaders take their batch size.
        margin: with ``"binsearch"``, the share by which the found size is lowered.
        max_val: the largest size to try.

    Returns:
        The size; None under ``fast_dev_run``.

    Raises:
        MisconfigurationException: an argument is wrong, there are several loaders to evaluate on, or the fit is inside
            of an epoch.
    """
    if trainer.fast_dev_run:
        rank_zero_warn("fast_dev_run is on: no batch size is searched.")
        return None
    check_arguments(
        mode=mode,
        steps_per_trial=steps_per_trial,
        init_val=init_val,
        max_trials=max_trials,
        margin=margin,
        max_val=max_val,
    )
    check_run(trainer, module, batch_arg_name)
    refuse_within_epoch(trainer, "scale_batch_size")
    session = session_of(trainer)
    if session.fn is not TrainerFn.FITTING:
        loaders = session.eval_loaders[session.fn.first_stage.dataloader_prefix]
        if loaders.several:
            raise MisconfigurationException(
                f"the batch-size finder was used with {len(loaders.loaders)} loaders in {session.fn.value}; it finds "
                "one size for one loader. Evaluate them one by one."
            )
    attribute = find([batch_arg_name], module, session.datamodule, flag="batch_arg_name")
    trials = _Trials(trainer, module, attribute, steps_per_trial, max_val)
    try:
        size = largest(
            trials.fits, start=init_val, limit=trials.limit, max_trials=max_trials, bisect=mode == "binsearch"
        )
    except BaseException:
        attribute.restore()
        raise
    if mode == "binsearch" and margin > 0:
        size = max(1, int(size * (1 - margin)))
    attribute.set(size)
    _take_up(trainer)
    rank_zero_info(f"{attribute.name} is set to {size}.")
    return size


def largest(fits: Callable[[int], bool], *, start: int, limit: Callable[[], int], max_trials: int, bisect: bool) -> int:
    """The largest of the sizes tried that fits.

    Args:
        fits: tries a size; size 1 must fit or raise.
        start: the first size. Where it does not fit it is halved until one does.
        limit: no size above it is tried; it may become smaller when the first one has been tried.
        max_trials: sizes that fit, after which to stop.
        bisect: go on between the largest that fits and the smallest that does not.
    """
    good, bad = 0, math.inf
    size, fitting = min(start, limit()), 0
    while True:
        if fits(size):
            good, fitting = size, fitting + 1
            if fitting >= max_trials or good >= limit():
                return min(good, limit())
        else:
            bad = size
        if good == 0:
            size = size // 2
        elif bad == math.inf:
            size = min(2 * good, limit())
        elif bisect and bad - good > 1:
            size = (good + int(bad)) // 2
        else:
            return good


class _Trials:
    """Tries sizes, each from the same state."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, attribute: Attribute, steps: int, max_val: int
    ) -> None:
        self._trainer, self._module, self._attribute, self._steps = trainer, module, attribute, steps
        self._max_val, self._samples = max_val, math.inf
        session = session_of(trainer)
        self._fitting = session.fn is TrainerFn.FITTING
        self._snapshot = Snapshot(module, session.optimizers, trainer.precision_plugin, trains=self._fitting)

    def limit(self) -> int:
        """The largest size that makes sense: ``max_val``, or the number of samples once it is known."""
        return int(min(self._max_val, max(1, self._samples)))

    def fits(self, size: int) -> bool:
        """Whether a short run with this size ends without running out of memory."""
        if self._trainer.root_device.type != "cpu":
            garbage_collection_cuda()  # what cycles of a trial before still hold on the device
        trial = Trial(self._trainer)
        self._attribute.set(size)
        fits = True
        try:
            self._run(trial)
        except (RuntimeError, MemoryError) as error:
            if not is_oom_error(error):
                raise
            if size == 1:
                error.add_note(f"fulmen: the batch-size finder ran out of memory with {self._attribute.name}=1.")
                raise
            fits = False
        finally:
            self._samples = min(self._samples, trial.samples)
            self._snapshot.restore()
        if not fits:
            garbage_collection_cuda()
        rank_zero_info(f"{self._attribute.name}={size} {'fits' if fits else 'runs out of memory'}.")
        return fits

    def _run(self, trial: Trial) -> None:
        steps = self._steps
        if not self._fitting:
            limits: dict[str, Any] = {f"limit_{trial.session.fn.first_stage.dataloader_prefix}_batches": steps}
            with trial.aside(**limits):
                trial.evaluate()
            return
        end = progress_of(self._trainer).updates + steps if self._module.automatic_optimization else -1
        with trial.aside(
            max_epochs=-1,
            min_epochs=0,
            max_steps=end,
            min_steps=0,
            limit_train_batches=1.0,
            limit_val_batches=steps if self._trainer.limit_val_batches != 0 else 0,
            val_check_interval=1.0,
            check_val_every_n_epoch=1,
        ):
            trial.train(steps, validation_batches=steps)


def _take_up(trainer: Trainer) -> None:
    """Let the call in hand ask for its loaders anew."""
    session, progress = session_of(trainer), progress_of(trainer)
    for loaders in session.eval_loaders.values():
        loaders.reload(progress.epoch)
    if session.train_loader is None or session.fn is not TrainerFn.FITTING:
        return
    session.train_loader.reload(progress.epoch)
    if was_composed(trainer):
        progress.replan = True
    elif session.schedulers:
        renew_optimizers(trainer)  # somebody asked for the number of batches already, likely to make a schedule
