"""The freshness of a monitored value: when it is produced, learnt by watching when it appears."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from fulmen_fabric import rank_zero_warn
from fulmen_protocols import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Moment", "MonitoredValue"]

Moment = Literal["step", "validation", "epoch"]


class MonitoredValue:
    """Knows whether a value in ``callback_metrics`` was produced at this moment or is left from an earlier one.

    Values stay in ``callback_metrics`` until they are replaced. One that was absent when a validation began and present
    when it ended is a validation's; one that first appears at a training epoch's end is the epoch's; one that is there
    after a training batch, before either, is logged at every step.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.source: Moment | None = None
        self.validated_at: int | None = None
        """Step at which a validation last ended in this run."""
        self._absent_before_validation = True
        self._has_warned = False

    def miss(
        self, owner: str, metrics: Mapping[str, Tensor], error: type[Exception] | None, *, meanwhile: str = ""
    ) -> None:
        """Tell that nobody has logged the value: raise ``error``, or without one warn, once.

        Args:
            owner: class name of the callback that monitors the value.
            metrics: what was logged.
            error: for a moment after which nothing is left that could produce the value.
            meanwhile: what the warning says of the time until it is there.
        """
        found = (
            f"{owner}(monitor={self.name!r}) found no such value.{did_you_mean(str(self.name), metrics)} "
            f"Logged are {sorted(metrics)!r}. Log it with self.log({self.name!r}, ...)."
        )
        if error is not None:
            raise error(found)
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(f"{found}{meanwhile}")

    def warn_if_misspelt(self, owner: str, metrics: Mapping[str, Tensor]) -> None:
        """Called after the sanity check, whose validation has logged all its names: long before the value is missed."""
        name = self.name
        if name is None or name in metrics:
            return
        # Training may log a value of its own whose name is similar, but hardly one that differs by a letter or two.
        close = get_close_matches(name, list(metrics), n=1, cutoff=0.85)
        if close:
            rank_zero_warn(
                f"{owner}(monitor={name!r}): validation logs {close[0]!r} and no {name!r}. Did you mean {close[0]!r}?"
            )

    def start(self) -> None:
        """Begin a run: its metrics are empty."""
        self.source = None
        self.validated_at = None

    def after_first_batch(self, metrics: Mapping[str, Tensor]) -> None:
        """Called once, after the first training batch of a run."""
        if self.source is None and self.name in metrics:
            self.source = "step"

    def before_validation(self, metrics: Mapping[str, Tensor]) -> None:
        """Called when a validation begins."""
        self._absent_before_validation = self.name not in metrics
        if self.source is None and not self._absent_before_validation:
            self.source = "step"

    def after_validation(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Called when a validation has ended at ``step``."""
        self.validated_at = step
        if self.source is None and self.name in metrics and self._absent_before_validation:
            self.source = "validation"

    def after_epoch(self, metrics: Mapping[str, Tensor]) -> None:
        """Called when a training epoch ends, after its validation."""
        if self.source is None and self.name in metrics:
            self.source = "epoch"

    def is_fresh(self, metrics: Mapping[str, Tensor], moment: Moment, step: int) -> bool:
        """Whether the value in ``metrics`` was produced at this ``moment`` of ``step``."""
        if self.name not in metrics:
            return False
        if moment == "step":
            return self.source in (None, "step")
        if moment == "validation":
            return self.source != "epoch"
        return self.source != "validation" or self.validated_at == step
