"""What ``ModelCheckpoint`` may be given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_protocols import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from datetime import timedelta

__all__ = ["check_arguments"]


def check_arguments(
    monitor: str | None, mode: str, save_top_k: int, steps: int | None, epochs: int | None, interval: timedelta | None
) -> None:
    """Raise ``MisconfigurationException`` for arguments that contradict each other or are out of range."""
    if save_top_k < -1:
        raise MisconfigurationException(
            f"ModelCheckpoint(save_top_k={save_top_k!r}): give a number of checkpoints to keep, or -1 for all."
        )
    if monitor is None and save_top_k not in (-1, 0, 1):
        raise MisconfigurationException(
            f"ModelCheckpoint(save_top_k={save_top_k}) has no monitor to rank by. "
            "Name a logged value in monitor, or use save_top_k of -1, 0 or 1."
        )
    if mode not in ("min", "max"):
        hint = did_you_mean(str(mode), ("min", "max"))
        raise MisconfigurationException(f"ModelCheckpoint(mode={mode!r}): it is 'min' or 'max'.{hint}")
    for name, count in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if count is not None and count < 0:
            raise MisconfigurationException(f"ModelCheckpoint({name}={count!r}): give at least 1, or 0 for never.")
    given = {"every_n_train_steps": steps, "every_n_epochs": epochs, "train_time_interval": interval}
    active = [name for name, value in given.items() if value]
    if len(active) > 1:
        raise MisconfigurationException(
            f"ModelCheckpoint got {' and '.join(active)}. Give one, and add a second ModelCheckpoint for the other."
        )
