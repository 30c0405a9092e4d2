"""EarlyStopping: ends training when a monitored value no longer improves."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fulmen.callbacks._monitor import Moment, MonitoredValue
from fulmen.callbacks._pickled import plain_state, restore
from fulmen.callbacks.callback import Callback
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["EarlyStopping", "EarlyStoppingReason"]


class EarlyStoppingReason(Enum):
    """Why training was ended."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Stop when ``monitor`` has not improved for a number of checks; any rank's wish stops all.

    A check counts only if the value was produced since the last one: epochs without a validation use up no patience
    for a value that validation logs.

    Args:
        monitor: name of the logged value.
        min_delta: how much better than the best a value must be to count as an improvement.
        patience: how many checks in a row without improvement stop training. A check is an epoch or a validation, see
            ``check_on_train_epoch_end``.
        verbose: whether to print improvements and the reason for stopping.
        mode: ``"min"`` or ``"max"``: which values are better.
        strict: whether a value that was never logged is an error; otherwise a warning.
        check_finite: whether NaN or infinity stops at once.
        stopping_threshold: stop at once when the value is better than this.
        divergence_threshold: stop at once when the value is worse than this.
        check_on_train_epoch_end: whether epochs are checked, or validations; by default epochs, if each ends with the
            one validation it has.
        log_rank_zero_only: whether only rank 0 prints.

    Attributes:
        wait_count: checks without improvement since the best value.
        best_score: the best value so far, shape ``()``, on the CPU.
        stopped_epoch: index of the epoch in which training was stopped; 0 while it was not.
        stopping_reason: why this rank stopped it; ``NOT_STOPPED`` also where another rank did.
        stopping_reason_message: the same in words.

    Raises:
        MisconfigurationException: ``mode`` is neither.
        MisconfigurationRuntimeError: with ``strict``, at the end of the epoch in which the value should have been
            logged.
    """

    mode_dict: ClassVar[dict[str, Callable[..., Tensor]]] = {"min": torch.lt, "max": torch.gt}
    order_dict: ClassVar[dict[str, str]] = {"min": "<", "max": ">"}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            hint = did_you_mean(str(mode), ("min", "max"))
            raise MisconfigurationException(f"EarlyStopping(mode={mode!r}): it is 'min' or 'max'.{hint}")
        self.monitor = monitor
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._check_on_train_epoch_end = check_on_train_epoch_end

        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = torch.tensor(torch.inf if mode == "min" else -torch.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._value = MonitoredValue(monitor)
        self._moment: Moment = "epoch"
        self._check_is_pending = False

    def __getstate__(self) -> dict[str, Any]:
        return plain_state(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)

    @property
    def state_key(self) -> str:
        """The class's name with monitor and mode, so that several can be used together."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """``torch.lt`` or ``torch.gt``: whether its first argument is better than its second."""
        return self.mode_dict[self.mode]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide when to check."""
        if self._check_on_train_epoch_end is None:
            once_an_epoch = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
            self._check_on_train_epoch_end = once_an_epoch

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a name that looks like a slip."""
        self._value.warn_if_misspelt("EarlyStopping", trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget which metrics an earlier run had."""
        self._value.start()
        self._check_is_pending = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether validation is what produces the value."""
        if not self._should_skip_check(trainer):
            self._value.before_validation(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, if validations are what is counted."""
        if self._should_skip_check(trainer):
            return
        self._value.after_validation(trainer.callback_metrics, trainer.global_step)
        if not self._check_on_train_epoch_end:
            self._check_at("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, if epochs are what is counted, or if a validation's check waits for the epoch's value."""
        if self._should_skip_check(trainer):
            return
        self._value.after_epoch(trainer.callback_metrics)
        if self._check_on_train_epoch_end or self._check_is_pending:
            self._check_is_pending = False
            self._check_at("epoch", trainer)

    def _should_skip_check(self, trainer: Trainer) -> bool:
        return trainer.state.fn != "fit" or trainer.sanity_checking or bool(trainer.fast_dev_run)

    def _check_at(self, moment: Moment, trainer: Trainer) -> None:
        self._moment = moment
        try:
            self._run_early_stopping_check(trainer)
        finally:
            self._moment = "epoch"

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        # Subclasses call it with the Trainer alone, at moments of their own.
        metrics, moment = trainer.callback_metrics, self._moment
        stop, message = False, None
        is_known = self.monitor in metrics
        if trainer.world_size > 1:  # one rank may log it alone
            is_known = trainer.strategy.reduce_boolean_decision(is_known, all=False)
        fresh = self._value.is_fresh(metrics, moment, trainer.global_step)
        if fresh:
            # One wait for the device per check.
            stop, message = self._evaluate_stopping_criteria(metrics[self.monitor].detach().cpu().squeeze())
        elif not is_known:
            self._missing(trainer, metrics, moment)
        # Every rank asks, also one that has nothing to say, since the others wait for its answer.
        if moment == "validation":
            self._check_is_pending = bool(trainer.strategy.reduce_boolean_decision(not fresh, all=False))
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
        if message is not None and self.verbose and (trainer.is_global_zero or not self.log_rank_zero_only):
            prefix = f"[rank {trainer.global_rank}] " if trainer.world_size > 1 else ""
            trainer.print(f"{prefix}{message}")

    def _missing(self, trainer: Trainer, metrics: Mapping[str, Tensor], moment: Moment) -> None:
        if self._value.validated_at is None and trainer.enable_validation:
            return  # the validation that may log it is yet to come
        is_over = self.strict and moment == "epoch"
        self._value.miss("EarlyStopping", metrics, MisconfigurationRuntimeError if is_over else None)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Whether to stop at the value ``current``, and what to say."""
        value, best = current.item(), self.best_score.item()
        sign = self.order_dict[self.mode]
        if self.check_finite and not math.isfinite(value):
            return self._stop(
                EarlyStoppingReason.NON_FINITE_METRIC,
                f"{self.monitor} is {value}, which is not finite; its best value was {best:.6g}. Training ends.",
            )
        if self.stopping_threshold is not None and self._is_better(value, self.stopping_threshold):
            return self._stop(
                EarlyStoppingReason.STOPPING_THRESHOLD,
                f"{self.monitor} = {value:.6g} {sign} {self.stopping_threshold}, its threshold. Training ends.",
            )
        if self.divergence_threshold is not None and self._is_better(-value, -self.divergence_threshold):
            return self._stop(
                EarlyStoppingReason.DIVERGENCE_THRESHOLD,
                f"{self.monitor} = {value:.6g} is beyond {self.divergence_threshold}, its divergence threshold. "
                "Training ends.",
            )
        if self._is_better(value - self.min_delta, best):
            self.best_score = current
            self.wait_count = 0
            was = f", from {best:.6g}" if math.isfinite(best) else ""
            return False, f"{self.monitor} improved to {value:.6g}{was}."
        self.wait_count += 1
        if self.wait_count >= self.patience:
            return self._stop(
                EarlyStoppingReason.PATIENCE_EXHAUSTED,
                f"{self.monitor} did not improve in {self.wait_count} checks; its best value was {best:.6g}. "
                "Training ends.",
            )
        return False, None

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self.mode == "min" else value > than

    def _stop(self, reason: EarlyStoppingReason, message: str) -> tuple[bool, str]:
        self.stopping_reason, self.stopping_reason_message = reason, message
        return True, message

    def state_dict(self) -> dict[str, Any]:
        """Best value, patience used, and why training was stopped."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the resumed run was; ``patience`` stays what it is now."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = state_dict["best_score"]
        # Files of older versions of Lightning have no reasons.
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
