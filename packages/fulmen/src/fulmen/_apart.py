"""A call of a Trainer whose processes are not the caller's own: it runs there, and what it has achieved comes back.

The weights, the callbacks' states, progress, metrics and results return; optimizers and attributes that hooks have set
on the module stay behind. So the next call goes on where this one ended, in new processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fulmen.states import TrainerFn, TrainerStatus
from fulmen_fabric import move_data_to_device, rank_zero_only

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fulmen.data_wait import DataWait
    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["Call", "run_apart"]


@dataclass
class Call:
    """The arguments of one call."""

    fn: TrainerFn
    module: LightningModule
    given: dict[str, object]
    datamodule: LightningDataModule | None
    options: dict[str, Any]


@dataclass
class Outcome:
    """What comes back of a call, from rank 0."""

    results: list[Any]
    status: TrainerStatus
    progress: Mapping[str, object]
    stop_reason: str | None
    callback_metrics: dict[str, Tensor]
    logged_metrics: dict[str, Tensor]
    bar_metrics: dict[str, float]
    weights: dict[str, Tensor] | None
    """After a fit, on the CPU."""
    callbacks: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])
    """Class and state of each callback that has one, or of any other: nothing."""
    versions: list[int | str | None] = field(default_factory=list["int | str | None"])
    """Of the loggers: what is logged later belongs to the same run."""
    data_wait: DataWait | None = None
    ckpt_path: str | None = None
    log_dir: str | None = None


def run_apart(trainer: Trainer, call: Call) -> list[Any]:
    """Run ``call`` in processes of its own and take over what comes back; returns its results."""
    try:
        outcome = trainer.world.launch(partial(_in_a_process, trainer, call))
    except BaseException:
        trainer.state.status, trainer.state.stage = TrainerStatus.INTERRUPTED, None
        raise
    _take_over(trainer, call, outcome)
    return outcome.results


def _in_a_process(trainer: Trainer, call: Call) -> Outcome:
    """What each of the processes does. It reaches into the Trainer as the Trainer's own methods do."""
    world = trainer.world
    rank_zero_only.rank = world.rank
    trainer._session = None  # pyright: ignore[reportPrivateUsage]  # a fork has that of the launching process
    trainer._reporter.is_global_zero = world.is_global_zero  # pyright: ignore[reportPrivateUsage]
    results = trainer._run(call.fn, call.module, call.given, call.datamodule, **call.options)  # pyright: ignore[reportPrivateUsage]
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    weights = None
    if call.fn is TrainerFn.FITTING:
        weights = {name: _on_cpu(value) for name, value in call.module.state_dict().items()}
    return Outcome(
        results=results,
        status=trainer.state.status,
        progress=progress.state_dict(),
        stop_reason=progress.stop_reason,
        callback_metrics=dict(trainer.callback_metrics),
        logged_metrics=dict(trainer.logged_metrics),
        bar_metrics={name: float(value) for name, value in trainer.progress_bar_metrics.items()},
        weights=weights,
        callbacks=[_state_of(one) for one in trainer.callbacks],
        versions=[logger.version for logger in trainer.loggers],
        data_wait=trainer.data_wait,
        ckpt_path=trainer.ckpt_path,
        log_dir=trainer.log_dir,
    )


def _on_cpu(value: Any) -> Any:
    return move_data_to_device(value.detach(), torch.device("cpu")) if isinstance(value, torch.Tensor) else value


def _state_of(callback: Any) -> tuple[str, dict[str, Any]]:
    state: dict[str, Any] = callback.state_dict() if hasattr(callback, "state_dict") else {}
    return type(callback).__qualname__, move_data_to_device(state, torch.device("cpu"))


def _take_over(trainer: Trainer, call: Call, outcome: Outcome) -> None:
    if outcome.weights is not None:
        # A module may have made layers in its hooks there, which this one does not have.
        call.module.load_state_dict(outcome.weights, strict=False)
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    progress.load_state_dict(outcome.progress)
    progress.stop_reason = outcome.stop_reason
    reporter = trainer._reporter  # pyright: ignore[reportPrivateUsage]
    reporter.replace(outcome.callback_metrics, outcome.logged_metrics, outcome.bar_metrics)
    for callback, (kind, state) in zip(trainer.callbacks, outcome.callbacks, strict=False):
        if not state or type(callback).__qualname__ != kind:
            continue
        if "dirpath" in state and getattr(callback, "dirpath", ...) is None:
            callback.dirpath = state["dirpath"]  # found at setup, which has run there
        callback.load_state_dict(state)
    for logger, version in zip(trainer.loggers, outcome.versions, strict=False):
        if getattr(getattr(type(logger), "version", None), "fset", None) is not None:
            logger.version = version  # type: ignore[misc]  # settable where the logger says so
    if call.fn is TrainerFn.FITTING:
        trainer._data_wait = outcome.data_wait  # pyright: ignore[reportPrivateUsage]
    trainer._ckpt_path = outcome.ckpt_path  # pyright: ignore[reportPrivateUsage]
    trainer._shared_log_dir = outcome.log_dir  # pyright: ignore[reportPrivateUsage]
    trainer.state.status, trainer.state.stage = outcome.status, None
