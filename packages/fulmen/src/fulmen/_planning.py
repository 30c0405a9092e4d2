"""From what the user set, and how long the training loader is, to the Plan of a fit."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING

from fulmen.plan import Plan
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from fulmen.settings import Settings

__all__ = ["make_plan"]


def make_plan(settings: Settings, *, batches: float, validates: bool) -> Plan:
    """The plan of a fit.

    Args:
        settings: what the user asked for.
        batches: of one training epoch on this rank; ``inf`` where the loader does not know its length.
        validates: whether there is anything to validate.

    Raises:
        MisconfigurationException: ``val_check_interval`` does not fit an epoch of so many batches.
    """
    interval = settings.val_check_interval
    return Plan(
        max_epochs=settings.max_epochs,
        min_epochs=settings.min_epochs,
        max_steps=settings.max_steps,
        min_steps=settings.min_steps,
        batches=batches,
        accumulate=settings.accumulate_grad_batches,
        validates=validates,
        validate_every_batches=_batches_between_validations(settings, batches, validates),
        validate_every_epochs=settings.check_val_every_n_epoch,
        validate_every_s=interval.total_seconds() if isinstance(interval, timedelta) else None,
        log_every=settings.log_every_n_steps,
        log_always=bool(settings.fast_dev_run),
    )


def _batches_between_validations(settings: Settings, batches: float, validates: bool) -> float:
    """``inf`` where only the epoch's end, or the clock, counts."""
    interval = settings.val_check_interval
    if isinstance(interval, int):
        if interval > batches and settings.check_val_every_n_epoch is not None and validates:
            raise MisconfigurationException(
                f"val_check_interval={interval} is longer than the epoch of {int(batches)} batches, so validation "
                "would never run. Give at most that, or check_val_every_n_epoch=None to count across epochs."
            )
        return interval
    if isinstance(interval, float) and interval != 1.0:
        if batches == math.inf:
            raise MisconfigurationException(
                f"val_check_interval={interval!r} is a fraction of the epoch, but the training loader does not "
                "know its length. Give 1.0, a number of batches, or a duration."
            )
        return max(1, int(batches * interval))
    return math.inf
