"""The training loop.

It reads like the loop one writes by hand: everything that differs between runs (devices, precision, accumulation,
clipping, hooks, when to validate) was decided before it starts and arrives as plain callables. It holds no Trainer,
knows no names, ranks or files, and reads no tensor, so nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from fulmen.hooks import FitHooks
    from fulmen.plan import Plan
    from fulmen.progress import Progress

__all__ = ["Batches", "FitParts", "fit"]

Batches = Iterable[tuple[object, bool]]
"""Batches of one epoch, each with whether it is the last."""


def _nothing(*_: object) -> None:
    """What costs nothing because nobody asked for it."""


@dataclass(frozen=True, slots=True)
class FitParts:
    """What training needs, as callables."""

    step: Callable[[object, int], object]
    """Train on ``(batch, batch_idx)`` and step the optimizer; returns the outputs for ``on_train_batch_end``."""
    accumulate: Callable[[object, int], object]
    """The same without the optimizer step."""
    transfer: Callable[[object], object] = lambda batch: batch
    """Put a batch on the device."""
    updates: Callable[[], int] | None = None
    """Optimizer steps taken so far, counted elsewhere (manual optimization); None: one per window."""
    schedule: Callable[[int, bool], None] | None = None
    """Step learning-rate schedulers: ``(batch_idx, epoch has ended)``, after each optimizer step."""
    schedule_on_metric: Callable[[int | None, bool], None] | None = None
    """Step schedulers that watch a metric: ``(batch_idx or None, epoch has ended)``."""
    log: Callable[[], None] = _nothing
    """Write a row to the loggers."""
    end_batch: Callable[[], None] | None = None
    """Called after each batch, for values that the user asked to reduce over ranks at every step."""
    end_epoch: Callable[[], None] = _nothing
    """Reduce epoch metrics; called before the hooks at the end of an epoch."""
    log_epoch: Callable[[], None] = _nothing
    """Write epoch metrics to the loggers; called after those hooks."""
    close_epoch: Callable[[], None] = _nothing
    """Forget what belonged to the epoch."""
    validate: Callable[[], None] = _nothing
    """Run the validation loop."""
    last_validation_s: Callable[[], float] | None = None
    """Clock for validation by time."""


def fit(parts: FitParts, plan: Plan, hooks: FitHooks, progress: Progress, batches: Callable[[], Batches]) -> None:
    """Train until the plan is finished or somebody asked to stop.

    Args:
        parts: how to train on a batch.
        plan: how far and how often.
        hooks: who wants to hear of it.
        progress: where the run is, and the only thing that changes. A run that was interrupted goes on from here.
        batches: gives the rest of the running epoch's batches, each with whether it is the last one.
    """
    while (progress.epoch_started and not progress.stop_now) or not plan.finished(progress):
        if not progress.epoch_ended:
            train_epoch(parts, plan, hooks, progress, batches)
            if progress.replan:
                return
        end_epoch(parts, hooks, progress)


def train_epoch(
    parts: FitParts, plan: Plan, hooks: FitHooks, progress: Progress, batches: Callable[[], Batches]
) -> None:
    """Train on the rest of the running epoch, or on less if the plan is finished on the way."""
    is_rest = progress.epoch_started
    if not start_epoch(hooks, progress):
        return
    if validation_is_owed(plan, progress, parts):
        parts.validate()
    progress.batch_is_open = False
    if is_rest and plan.finished(progress):
        return

    transfer, schedule, validates = parts.transfer, parts.schedule, plan.validates
    for batch, is_last in batches():
        batch_idx = progress.batch
        batch = transfer(batch)
        for hook in hooks.on_train_batch_start:
            hook(batch, batch_idx)
        for hook in hooks.module_on_train_batch_start:
            if hook(batch, batch_idx) == -1:
                skip_rest_of_epoch(parts, progress, batch_idx)
                return

        stepping = plan.steps(batch_idx, is_last)
        outputs = (parts.step if stepping else parts.accumulate)(batch, batch_idx)

        progress.batch = batch_idx + 1
        progress.total_batches += 1
        progress.epoch_is_whole = is_last
        progress.window_is_open = not stepping
        progress.batch_is_open = True
        if stepping:
            progress.stepped_batches += 1
            progress.updates = progress.updates + 1 if parts.updates is None else parts.updates()
        if schedule is not None and (stepping or is_last):
            schedule(batch_idx, is_last)

        for hook in hooks.on_train_batch_end:
            hook(outputs, batch, batch_idx)
        if parts.end_batch is not None:
            parts.end_batch()
        if stepping and plan.logs(progress):
            parts.log()
        if validates and validation_due(parts, plan, progress, is_last):
            parts.validate()
        if stepping and parts.schedule_on_metric is not None:
            parts.schedule_on_metric(batch_idx, False)
        progress.batch_is_open = False
        if progress.replan or plan.finished(progress):
            return

    if progress.batch == 0:
        raise MisconfigurationException(
            "the training loader gave no batch, so training would never end. Check its data set, its batch_size with "
            "drop_last=True, and limit_train_batches."
        )
    progress.epoch_is_whole = True


def start_epoch(hooks: FitHooks, progress: Progress) -> bool:
    """Tell the hooks that an epoch starts; False if somebody has changed the run, which holds from its first batch."""
    if not progress.epoch_started:
        progress.cut_at = 0
        for hook in hooks.on_train_epoch_start:
            hook()
        progress.epoch_started = True
    return not progress.replan


def end_epoch(parts: FitParts, hooks: FitHooks, progress: Progress) -> None:
    """Close the running epoch: reduce its metrics, tell the hooks, step what watches metrics, write the row."""
    resumed_behind_hooks = progress.epoch_ended
    if not resumed_behind_hooks:
        progress.epoch_ended = True
        progress.cut_at = 0 if progress.epoch_is_whole else progress.batch
        parts.end_epoch()
        for hook in hooks.on_train_epoch_end:
            hook()
    if progress.epoch_is_whole and parts.schedule_on_metric is not None:
        parts.schedule_on_metric(None, True)
    if not resumed_behind_hooks:  # else the run that wrote the checkpoint went on to write the row
        parts.log_epoch()
    parts.close_epoch()
    progress.epoch += 1
    progress.batch = 0
    progress.epoch_started = progress.epoch_ended = progress.epoch_is_whole = False


def skip_rest_of_epoch(parts: FitParts, progress: Progress, batch_idx: int) -> None:
    """The module's ``on_train_batch_start`` returned -1: the epoch ends here and, unlike a stopped one, is whole."""
    progress.epoch_is_whole = True
    if parts.schedule is not None:
        parts.schedule(batch_idx, True)


def validation_due(parts: FitParts, plan: Plan, progress: Progress, is_last: bool) -> bool:
    """Whether to validate after the batch just done."""
    clock = parts.last_validation_s
    return plan.validation_due(progress, is_last, last_validation_s=None if clock is None else clock())


def validation_is_owed(plan: Plan, progress: Progress, parts: FitParts) -> bool:
    """Whether a run resumed between a batch and the validation that follows it."""
    if progress.batch == 0 or progress.validated_at == progress.total_batches or plan.validate_every_s is not None:
        return False
    return validation_due(parts, plan, progress, progress.epoch_is_whole)
