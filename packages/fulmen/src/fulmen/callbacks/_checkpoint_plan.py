"""When a ``ModelCheckpoint`` will save, what it keeps and where, in words: for a look at a run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datetime import timedelta

    from fulmen.callbacks.model_checkpoint import ModelCheckpoint
    from fulmen.trainer import Trainer

__all__ = ["describe_plan", "epochs_end_with_validation"]


def epochs_end_with_validation(trainer: Trainer) -> bool:
    """Whether saving at the end of every epoch comes after all the validation there is: one at each end, or none."""
    batches: Any = trainer.num_val_batches  # a list, or one number
    if (sum(cast("list[float]", batches)) if isinstance(batches, list) else batches) == 0:
        return True
    return trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0


def describe_plan(
    callback: ModelCheckpoint,
    trainer: Trainer,
    steps: int,
    interval: timedelta | None,
    epochs: int,
    at_epoch_end: bool | None,
    folder: str,
) -> str:
    """One line such as ``saves after every 100 optimizer steps; keeps the 3 best by val_loss (min); in runs/1``."""
    monitor, top_k = callback.monitor, callback.save_top_k
    if at_epoch_end is None:
        at_epoch_end = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    if steps:
        when = f"after every {_counted(steps, 'optimizer step')}"
    elif interval:
        when = f"{interval} after the last save"
    elif epochs:
        when = f"at the end of {'every epoch' if epochs == 1 else f'epochs {epochs}, {2 * epochs}, {3 * epochs}, ...'}"
        when = when if at_epoch_end else f"at the end of every validation of {when.removeprefix('at the end of ')}"
    else:
        when = "never"
    if monitor is not None and top_k != 0:
        when += f", when {monitor} has been logged for these weights"
    kept = {0: "none", -1: "all"}.get(top_k)
    if kept is None:
        best = "best" if top_k == 1 else f"{top_k} best"
        kept = "the newest" if monitor is None else f"the {best} by {monitor} ({callback.mode})"
    also = {"link": " and a link to the newest"}.get(str(callback.save_last), " and one named last")
    return f"saves {when}; keeps {kept}{also if callback.save_last else ''}; in {folder}"


def _counted(number: int, noun: str) -> str:
    return noun if number == 1 else f"{number} {noun}s"
