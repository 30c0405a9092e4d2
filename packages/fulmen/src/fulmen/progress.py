"""Progress: how far a run has come. The only mutable state of the loop, and all of it that a checkpoint needs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Progress"]

_VERSION = 1


@dataclass(slots=True)
class Progress:
    """Typed counters of one training run.

    ``current_epoch`` and ``global_step`` of the Trainer are ``epoch`` and ``updates``; loggers draw over
    ``stepped_batches``, which differs from ``updates`` when several optimizers step in one batch.
    """

    epoch: int = 0
    """Completed epochs."""
    batch: int = 0
    """Batches done in the running epoch; the ``batch_idx`` of the next one."""
    total_batches: int = 0
    """Batches done in all epochs."""
    updates: int = 0
    """Optimizer steps taken, all optimizers together."""
    stepped_batches: int = 0
    """Batches that ended with an optimizer step, the last one included."""
    window_is_open: bool = False
    """Whether the last batch left its gradients for a later step."""
    batch_is_open: bool = False
    """Whether the last batch is still being reported on: its hooks, its row and its validation belong to it."""
    validated_at: int = -1
    """``total_batches`` at the end of the last validation; -1 before the first."""
    epoch_started: bool = False
    """Whether ``on_train_epoch_start`` of the running epoch has been called."""
    epoch_ended: bool = False
    """Whether the hooks at the end of the running epoch have begun; a checkpoint written in them resumes after them."""
    epoch_is_whole: bool = False
    """Whether the running epoch has seen its last batch (schedulers by epoch step only then)."""
    cut_at: int = 0
    """Batches of the last epoch, or of the one that ends, where it was left before its end; 0: it was whole."""
    wall_time_s: float = 0.0
    """Seconds spent in ``fit``, over all resumes."""

    # The rest lives for one call only and is not saved.
    stop_reason: str | None = None
    """Why somebody asked the run to stop; None while nobody has."""
    stop_now: bool = False
    """The reason does not wait for ``min_epochs`` and ``min_steps`` (a signal)."""
    replan: bool = False
    """Somebody changed the plan, the parts or the hooks: leave the loop after this batch, come back with new ones."""

    @property
    def log_step(self) -> int:
        """Where loggers draw: the number of batches that had stepped before the one being reported on."""
        return self.stepped_batches - int(self.batch_is_open and not self.window_is_open)

    def stop(self, reason: str, *, now: bool = False) -> None:
        """Ask the run to stop; ``now`` does not wait for its minimum. The first reason is kept."""
        self.stop_now = self.stop_now or now
        if self.stop_reason is None:
            self.stop_reason = reason

    def go_back_into_cut_epoch(self) -> bool:
        """Take up the epoch that was left before its end, where it was left; False if there is none."""
        if not self.cut_at:
            return False
        if not self.epoch_ended:  # it was counted already
            self.epoch -= 1
        self.batch, self.cut_at = self.cut_at, 0
        self.epoch_started, self.epoch_ended = True, False
        return True

    def begin_again(self) -> None:
        """A new call of ``fit``: nobody has asked it to stop, and an epoch that failed midway starts anew.

        Its loader starts anew, too; going on at the old batch would leave out the epoch's last ones.
        """
        self.stop_reason, self.stop_now = None, False
        if self.epoch_started and not self.epoch_ended:
            self.batch = 0
            self.epoch_started = self.epoch_is_whole = self.batch_is_open = self.window_is_open = False

    def state_dict(self) -> dict[str, object]:
        """The counters as plain data, with the version of their schema."""
        saved = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TRANSIENT}
        return {"version": _VERSION, **saved}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over counters.

        Raises:
            ValueError: they were written by a newer version, or hold something that is no counter.
        """
        version = state.get("version")
        if version != _VERSION:
            raise ValueError(
                f"progress has schema version {version!r}; this fulmen reads {_VERSION}. "
                "Update fulmen to resume this run."
            )
        known = {f.name for f in fields(self)} - _TRANSIENT
        for name, value in state.items():
            if name == "version":
                continue
            if name not in known or not isinstance(value, (int, float)):
                raise ValueError(f"progress holds {name!r} = {value!r}, which is none of its counters.")
            setattr(self, name, value)


_TRANSIENT = frozenset({"stop_reason", "stop_now", "replan"})
