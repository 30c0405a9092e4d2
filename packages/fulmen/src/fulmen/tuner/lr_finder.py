"""The learning-rate range test: train on ever larger learning rates and see where the loss falls fastest.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from fulmen._loss_weights import per_weight
from fulmen.callbacks.callback import Callback
from fulmen.optimizer import LRSchedulerConfig, NoOptimizer
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
from fulmen_fabric.rank_zero import rank_zero_info, rank_zero_warn
from fulmen_protocols import MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from torch.optim import Optimizer

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["MODES", "check_arguments", "lr_find"]

MODES = ("linear", "exponential")
_NAMES = ("lr", "learning_rate")
_BETA = 0.98
"""Weight of the past in the smoothed loss."""


def check_arguments(
    *, min_lr: float, max_lr: float, num_training: int, mode: str, early_stop_threshold: float | None
) -> None:
    """Refuse what no range test can be made of.

    Raises:
        MisconfigurationException: with one sentence for each argument that is wrong.
    """
    wrong: list[str] = []
    if mode not in MODES:
        wrong.append(f"mode={mode!r} must be one of {', '.join(map(repr, MODES))}.")
    if not min_lr < max_lr:
        wrong.append(f"min_lr={min_lr!r} must be smaller than max_lr={max_lr!r}.")
    if min_lr < 0 or (min_lr == 0 and mode == "exponential"):
        wrong.append(f"min_lr={min_lr!r} must be positive: no factor leads from it to max_lr. mode='linear' takes 0.")
    if num_training < 1:
        wrong.append(f"the number of learning rates to try is {num_training!r}; give at least 1.")
    if early_stop_threshold is not None and early_stop_threshold <= 0:
        wrong.append(f"early_stop_threshold={early_stop_threshold!r} must be positive; None never stops early.")
    if wrong:
        raise MisconfigurationException("the learning-rate finder: " + " ".join(wrong))


class _LRFinder:  # Lightning's name
    """What a range test found.

    Args:
        mode: how the learning rate rose, ``"exponential"`` or ``"linear"``.
        lr_min: where it began.
        lr_max: where it would have ended.
        num_training: how many learning rates were to be tried.

    Attributes:
        results: ``"lr"`` and ``"loss"``, one number for each optimizer step. The loss is smoothed: an exponential
            moving average with weight 0.98 for the past, divided by ``1 - 0.98**(k + 1)`` after ``k`` losses.
    """

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        self.mode = mode
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.num_training = num_training
        self.results: dict[str, list[float]] = {}
        self._optimal_idx: int | None = None

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss fell fastest.

        Args:
            skip_begin: points at the beginning that do not count: there is little past to smooth over.
            skip_end: points at the end that do not count: there the loss may be about to rise.

        Returns:
            The learning rate; None where fewer than two finite points are left.
        """
        lrs, losses = self.results.get("lr", []), self.results.get("loss", [])
        indices = [i for i in range(skip_begin, len(losses) - skip_end) if math.isfinite(losses[i])]
        self._optimal_idx = None
        if len(indices) < 2:
            rank_zero_warn(
                f"the learning-rate finder can suggest nothing: of {len(losses)} points, {len(indices)} finite ones "
                f"are left without the first {skip_begin} and the last {skip_end}. Try more learning rates, or give "
                "more data."
            )
            return None
        (slope,) = torch.gradient(
            torch.tensor([losses[i] for i in indices]), spacing=[torch.tensor([lrs[i] for i in indices])]
        )
        self._optimal_idx = indices[int(slope.argmin())]
        return lrs[self._optimal_idx]

    def plot(self, suggest: bool = False, show: bool = False, ax: Axes | None = None) -> Figure | SubFigure | None:
        """Draw the loss over the learning rate. Needs matplotlib.

        Args:
            suggest: mark the suggestion with a red point.
            show: open a window.
            ax: where to draw; None: in a new figure.

        Returns:
            The figure.

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MissingPackage("plot() draws with matplotlib: pip install 'fulmen[plot]'") from error
        lrs, losses = self.results["lr"], self.results["loss"]
        if ax is None:
            _, ax = plt.subplots()
        ax.plot(lrs, losses)
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        if suggest:
            self.suggestion()
            if self._optimal_idx is not None:
                ax.plot(lrs[self._optimal_idx], losses[self._optimal_idx], markersize=10, marker="o", color="red")
        if show:
            plt.show()
        return ax.figure

    def lr_at(self, step: int) -> float:
        """The learning rate of the optimizer step with this index. Index 0 has ``lr_min``; the last one ``lr_max``."""
        if step == 0:
            return self.lr_min
        share = (step + 1) / self.num_training
        if self.mode == "linear":
            return self.lr_min + share * (self.lr_max - self.lr_min)
        return float(self.lr_min * (self.lr_max / self.lr_min) ** share)


def lr_find(
    trainer: Trainer,
    module: LightningModule,
    *,
    min_lr: float = 1e-8,
    max_lr: float = 1.0,
    num_training: int = 100,
    mode: str = "exponential",
    early_stop_threshold: float | None = 4.0,
    update_attr: bool = False,
    attr_name: str = "",
) -> _LRFinder | None:
    """Run a range test inside of the fit in hand; every rank must call it.

    Args:
        trainer: which is fitting.
        module: what it trains.
        min_lr: the first learning rate.
        max_lr: the last one.
        num_training: how many optimizer steps it takes from one to the other.
        mode: how it rises, ``"exponential"`` or ``"linear"``.
        early_stop_threshold: end when the loss is so many times the best one; None: never. Rank 0's loss decides.
        update_attr: write the suggestion into the module, the datamodule, their ``hparams`` and the optimizer.
        attr_name: where to write it; by default ``lr`` or ``learning_rate``.

    Returns:
        What was found; None under ``fast_dev_run``.

    Raises:
        MisconfigurationException: an argument is wrong, there is not exactly one optimizer, nobody has the attribute,
            or the fit is inside of an epoch.
    """
    if trainer.fast_dev_run:
        rank_zero_warn("fast_dev_run is on: no learning rate is searched.")
        return None
    check_arguments(
        min_lr=min_lr,
        max_lr=max_lr,
        num_training=num_training,
        mode=mode,
        early_stop_threshold=early_stop_threshold,
    )
    refuse_within_epoch(trainer, "lr_find")
    session = session_of(trainer)
    optimizer = _only_optimizer(session.optimizers)
    names = (attr_name,) if attr_name else _NAMES
    attribute = find(names, module, session.datamodule, flag="lr_find(attr_name=...)") if update_attr else None

    found = _LRFinder(mode, min_lr, max_lr, num_training)
    test = _RangeTest(found, optimizer, early_stop_threshold, shows=trainer.progress_bar_callback is not None)
    trial = Trial(trainer)
    snapshot = Snapshot(module, session.optimizers, trainer.precision_plugin, trains=True)
    try:
        ramp = _Ramp(optimizer)
        # As many as the module's own, which may look for them by index.
        schedulers = [LRSchedulerConfig(ramp, name=each.name, interval="step") for each in session.schedulers]
        limit = progress_of(trainer).updates + num_training if module.automatic_optimization else -1
        with trial.aside([test], schedulers, max_epochs=-1, min_epochs=0, max_steps=limit, min_steps=0):
            trial.train(num_training)
    finally:
        snapshot.restore()
        test.close()
    found.results = trainer.strategy.broadcast({"lr": test.lrs, "loss": test.losses})
    stopped = progress_of(trainer).stop_now
    if len(test.losses) < num_training:
        why = "the run was asked to stop" if stopped else "the loss diverged"
        rank_zero_info(f"the learning-rate finder ended after {len(test.losses)} of {num_training} steps: {why}.")
    if attribute is None or stopped:
        return found
    suggestion = found.suggestion()
    if suggestion is not None:
        attribute.set(suggestion)
        _use(trainer, suggestion)
        rank_zero_info(f"{attribute.name} is set to {suggestion}.")
    return found


def _only_optimizer(optimizers: Sequence[Optimizer]) -> Optimizer:
    if len(optimizers) != 1:
        kinds = ", ".join(type(each).__name__ for each in optimizers) or "none"
        raise MisconfigurationException(
            f"the learning-rate finder needs exactly one optimizer, and configure_optimizers returned "
            f"{len(optimizers)} ({kinds}). Try learning rates for one of them by hand, or return one with several "
            "parameter groups."
        )
    if isinstance(optimizers[0], NoOptimizer):
        raise MisconfigurationException(
            "the learning-rate finder needs exactly one optimizer, and configure_optimizers returned None. Return one."
        )
    return optimizers[0]


def _use(trainer: Trainer, lr: float) -> None:
    """Let the fit in hand train with ``lr``."""
    session = session_of(trainer)
    if session.schedulers and not was_composed(trainer):
        renew_optimizers(trainer)  # so that schedules start from it, however they are made
        return
    (optimizer,) = session.optimizers
    # A running schedule keeps its shape: it is scaled so that its value now is the suggestion.
    factors = [lr / float(group["lr"]) if group["lr"] else math.inf for group in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        _set_lr(group, lr)
        if "initial_lr" in group:
            group["initial_lr"] = _scaled(group["initial_lr"], factor, lr)
    for config in session.schedulers:
        scheduler = config.scheduler
        if hasattr(scheduler, "base_lrs"):
            bases = zip(scheduler.base_lrs, factors, strict=True)
            scheduler.base_lrs = [_scaled(base, factor, lr) for base, factor in bases]
        if hasattr(scheduler, "_last_lr"):
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _scaled(base: Any, factor: float, lr: float) -> float:
    return lr if factor == math.inf else float(base) * factor


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):  # a compiled or captured step reads this very tensor
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class _Ramp:
    """Stands in for the user's schedulers during a range test. What sets the learning rate is the test itself."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def base_lrs(self) -> list[float]:
        return self.get_last_lr()

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, *_: object, **__: object) -> None:
        """Leave it to the test."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """There is nothing to load."""


class _RangeTest(Callback):
    """Raises the learning rate after every optimizer step, and notes it with the smoothed loss.

    Reads the loss after every step, which waits for the device.
    """

    def __init__(self, found: _LRFinder, optimizer: Optimizer, threshold: float | None, *, shows: bool) -> None:
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self._found, self._optimizer, self._threshold, self._shows = found, optimizer, threshold, shows
        self._average = 0.0
        self._best = math.inf
        self._bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._raise_lr()
        if self._shows and trainer.is_global_zero:
            total = self._found.num_training
            self._bar = tqdm(desc="learning rates", total=total, leave=False, disable=None)  # None: on a terminal only

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if progress_of(trainer).window_is_open:
            return
        smoothed = self._smooth(_loss(per_weight(trainer, outputs)))
        self.lrs.append(self._found.lr_at(len(self.losses)))
        self.losses.append(smoothed)
        diverged = self._has_diverged(smoothed)
        if self._threshold is not None and trainer.strategy.broadcast(diverged):
            progress_of(trainer).stop("the loss of the range test diverged", now=True)
        self._best = min(self._best, smoothed)
        self._raise_lr()
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _raise_lr(self) -> None:
        for group in self._optimizer.param_groups:
            _set_lr(group, self._found.lr_at(len(self.losses)))

    def _smooth(self, loss: float | None) -> float:
        if loss is None:
            return math.nan
        self._average = _BETA * self._average + (1 - _BETA) * loss
        return self._average / (1 - _BETA ** (len(self.losses) + 2))

    def _has_diverged(self, smoothed: float) -> bool:
        if self._threshold is None or self._best == math.inf:
            return False
        # Below zero, where a multiple of the best loss is better still, the distance to it counts.
        best = self._best
        return smoothed > (self._threshold * best if best > 0 else best + (self._threshold - 1) * abs(best))


def _loss(outputs: object) -> float | None:
    if isinstance(outputs, Mapping):
        outputs = cast("Mapping[str, object]", outputs).get("loss")
    return float(outputs.detach()) if isinstance(outputs, Tensor) else None
