"""When learning-rate schedulers step: each by its interval and frequency, those watching a metric once it is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen_fabric import rank_zero_warn
from fulmen_protocols import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fulmen.optimizer import LRSchedulerConfig
    from fulmen.progress import Progress

__all__ = ["as_it_is", "plain_schedule", "watching_schedule"]


def as_it_is(step: Callable[..., None]) -> Callable[..., None]:
    """What ``measured`` is where nothing is."""
    return step


def plain_schedule(
    configs: Sequence[LRSchedulerConfig],
    progress: Progress,
    overridden: Callable[..., Any] | None,
    measured: Callable[[Callable[..., None]], Callable[..., None]] = as_it_is,
) -> Callable[[int, bool], None] | None:
    """Step the schedulers that need no metric; None when there are none.

    Called with ``(batch_idx, epoch has ended)`` after an optimizer step. ``frequency`` counts batches of the epoch for
    ``interval="step"`` and epochs of the run for ``interval="epoch"``. ``measured`` wraps each single step.
    """
    by_step = [c for c in configs if not c.reduce_on_plateau and c.interval == "step"]
    by_epoch = [c for c in configs if not c.reduce_on_plateau and c.interval == "epoch"]
    if not by_step and not by_epoch:
        return None
    step = measured(_step)

    def schedule(batch_idx: int, epoch_has_ended: bool) -> None:
        for config in by_step:
            if (batch_idx + 1) % config.frequency == 0:
                step(config, None, overridden)
        if epoch_has_ended:
            for config in by_epoch:
                if (progress.epoch + 1) % config.frequency == 0:
                    step(config, None, overridden)

    return schedule


def watching_schedule(
    configs: Sequence[LRSchedulerConfig],
    progress: Progress,
    overridden: Callable[..., Any] | None,
    metrics: Callable[[], Mapping[str, Any]],
    measured: Callable[[Callable[..., None]], Callable[..., None]] = as_it_is,
) -> Callable[[int | None, bool], None] | None:
    """Step the schedulers that watch a metric; None when there are none.

    Called with ``(batch_idx, False)`` after an optimizer step and its validation, and ``(None, True)`` at the end of an
    epoch.

    Raises:
        MisconfigurationException: the metric has not been logged and the scheduler is ``strict``.
    """
    watching = [c for c in configs if c.reduce_on_plateau]
    if not watching:
        return None
    step = measured(_step)

    def schedule(batch_idx: int | None, epoch_has_ended: bool) -> None:
        for config in watching:
            if config.interval == "step":
                due = batch_idx is not None and (batch_idx + 1) % config.frequency == 0
            else:
                due = epoch_has_ended and (progress.epoch + 1) % config.frequency == 0
            if not due:
                continue
            known = metrics()
            value = None if config.monitor is None else known.get(config.monitor)
            if value is None:
                names = ", ".join(sorted(known)) or "none"
                text = (
                    f"the learning-rate scheduler {type(config.scheduler).__name__} watches {config.monitor!r}, "
                    f"which has not been logged.{did_you_mean(str(config.monitor), known)} Logged so far: {names}. "
                )
                if config.strict:
                    raise MisconfigurationException(text + "Log it, or set 'strict': False in the scheduler's dict.")
                rank_zero_warn(text + "The scheduler is not stepped this time.")
                continue
            step(config, value, overridden)

    return schedule


def _step(config: LRSchedulerConfig, metric: Any, overridden: Callable[..., Any] | None) -> None:
    scheduler: Any = config.scheduler
    if overridden is not None:
        overridden(scheduler, metric)
    elif metric is None:
        scheduler.step()
    else:
        scheduler.step(metric)
