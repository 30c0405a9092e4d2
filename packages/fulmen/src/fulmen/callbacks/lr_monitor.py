"""LearningRateMonitor: learning rates, and what moves with them, in the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen._metric_read import read_scalars
from fulmen._reporting import reporter_of
from fulmen.callbacks.callback import Callback
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """Logs the learning rate of every parameter group, and puts it into ``trainer.callback_metrics``.

    Names: the ``name`` of the scheduler's configuration if it has one, else ``lr-SGD`` by the optimizer's class, with
    ``-1``, ``-2``, ... from the second optimizer of a class on. With several parameter groups ``/pg1``, ``/pg2``, ...
    follows, or ``/name`` for groups that have a ``"name"``.

    Args:
        logging_interval: ``"step"``, ``"epoch"``, or None: at the interval of the schedulers; without one, at both.
        log_momentum: log momentum (or the first beta) too, under ``...-momentum``.
        log_weight_decay: log weight decay too, under ``...-weight_decay``.
        log_key_prefix: stands before every name.

    Raises:
        MisconfigurationException: ``logging_interval`` is something else.
    """

    def __init__(
        self,
        logging_interval: str | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
        log_key_prefix: str | None = None,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): use 'step', 'epoch' or None."
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.log_key_prefix = log_key_prefix or ""
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float] = {}
        self.last_weight_decay_values: dict[str, float] = {}
        self._named: list[tuple[str, Optimizer, str]] = []

    @property
    def lr_sch_names(self) -> list[str]:
        """The name of each optimizer, without parameter groups."""
        return [name for name, _, _ in self._named]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the optimizers.

        Raises:
            MisconfigurationException: there is no logger, or two parameter groups have the same name.
        """
        if not trainer.loggers:
            raise MisconfigurationException(
                "LearningRateMonitor needs a logger, and the Trainer has none: leave out the callback, or "
                "logger=False (fast_dev_run has no logger either)."
            )
        if self.log_momentum and not any(
            {"momentum", "betas"} & set(optimizer.defaults) for optimizer in trainer.optimizers
        ):
            rank_zero_warn("LearningRateMonitor(log_momentum=True): no optimizer has momentum or betas; 0 is logged.")
        self._named = self._name_all(trainer)
        for name, optimizer, _ in self._named:
            groups = self._group_names(name, optimizer)
            if len(set(groups)) < len(groups):
                raise MisconfigurationException(
                    f"LearningRateMonitor: parameter groups of {type(optimizer).__name__} share a name: {groups!r}. "
                    "Give each group its own 'name'."
                )
            self.lrs.update({group: [] for group in groups})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log at the batches that the loggers get rows for."""
        if self.logging_interval == "epoch" or not trainer.log_every_n_steps:
            return
        x = trainer.batches_that_stepped
        if (x + 1) % trainer.log_every_n_steps == 0 or trainer.should_stop:
            self._log(trainer, "any" if self.logging_interval == "step" else "step", x)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log at the epoch's start."""
        if self.logging_interval != "step":
            self._log(trainer, "any" if self.logging_interval == "epoch" else "epoch", trainer.batches_that_stepped)

    def _log(self, trainer: Trainer, interval: str, x: int) -> None:
        latest = self._extract(trainer, interval)
        if not latest:
            return
        if trainer.is_global_zero:
            reporter = reporter_of(trainer)
            for logger in trainer.loggers:
                reporter.pass_on(logger, dict(latest), x)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in latest.items()})

    def _extract(self, trainer: Trainer, interval: str) -> dict[str, float]:
        """Values of the optimizers whose scheduler has this interval, ``"any"``: of all."""
        if self._is_outdated(trainer):
            self._named = self._name_all(trainer)
        latest: dict[str, float | Tensor] = {}
        for name, optimizer, own_interval in self._named:
            if "any" not in (interval, own_interval) and interval != own_interval:
                continue
            for key, group in zip(self._group_names(name, optimizer), optimizer.param_groups, strict=True):
                latest[key] = group["lr"]
                if self.log_momentum:
                    betas = group.get("betas")
                    latest[f"{key}-momentum"] = group.get("momentum", 0) if betas is None else betas[0]
                if self.log_weight_decay:
                    latest[f"{key}-weight_decay"] = group.get("weight_decay", 0)
        # Learning rates are tensors where the step is compiled or captured.
        numbers = dict(zip(latest, read_scalars(list(latest.values())), strict=True))
        for key, value in numbers.items():
            if key.endswith("-momentum"):
                self.last_momentum_values[key] = value
            elif key.endswith("-weight_decay"):
                self.last_weight_decay_values[key] = value
            else:
                self.lrs.setdefault(key, []).append(value)
        return numbers

    def _is_outdated(self, trainer: Trainer) -> bool:
        """Optimizers can be replaced during a run."""
        return {id(optimizer) for _, optimizer, _ in self._named} != {id(each) for each in trainer.optimizers}

    def _name_all(self, trainer: Trainer) -> list[tuple[str, Optimizer, str]]:
        """A name and an interval for every optimizer: its scheduler's, or ``"any"``."""
        named: list[tuple[str, Optimizer, str]] = []
        seen: dict[str, int] = {}
        scheduled: set[int] = set()

        def unique(name: str) -> str:
            count = seen.get(name, 0)
            seen[name] = count + 1
            return f"{name}-{count}" if count else name

        for config in trainer.lr_scheduler_configs:
            optimizer: Any = getattr(config.scheduler, "optimizer", None)
            if optimizer is None or id(optimizer) in scheduled:
                continue
            scheduled.add(id(optimizer))
            name = config.name if config.name is not None else f"lr-{type(optimizer).__name__}"
            named.append((unique(self.log_key_prefix + name), optimizer, config.interval))
        rest = (each for each in trainer.optimizers if id(each) not in scheduled)
        named += [(unique(f"{self.log_key_prefix}lr-{type(each).__name__}"), each, "any") for each in rest]
        return named

    def _group_names(self, name: str, optimizer: Optimizer) -> list[str]:
        groups = optimizer.param_groups
        if len(groups) == 1 and "name" not in groups[0]:
            return [name]
        return [f"{name}/{group.get('name', f'pg{index}')}" for index, group in enumerate(groups, start=1)]
