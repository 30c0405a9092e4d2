"""The list of loggers, and the hyperparameters they are told once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from fulmen._reporting import reporter_of
from fulmen._silent import DummyLogger, MutedLogger
from fulmen.hparams import hyperparameters_for_loggers
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    LOGGERS,
    Logger,
    MisconfigurationTypeError,
    NotConforming,
    SupportsGraph,
    check,
    load,
)

if TYPE_CHECKING:
    from fulmen._session import Session
    from fulmen.settings import Settings
    from fulmen.trainer import Trainer
    from fulmen_fabric import World

__all__ = ["complete", "follow_rank_zero", "log_hyperparameters"]


def complete(logger: Logger | Iterable[Logger] | bool | None, settings: Settings) -> list[Logger]:
    """The loggers of a run: those given, a default one, or none."""
    if settings.barebones or logger is False:
        return []
    if settings.fast_dev_run:
        return [DummyLogger()]  # code that uses self.logger.experiment runs in a quick run too
    if logger is None or logger is True:
        # Asking for "the default" is asking for what is installed; the line says which it was.
        name = "tensorboard" if find_spec("tensorboardX") is not None else "csv"
        rank_zero_info(f"logger: {name} in {settings.default_root_dir}/lightning_logs")
        if name == "csv":
            if logger is True:
                rank_zero_warn(
                    "logger=True means TensorBoard, and tensorboardX is not installed: metrics go to a CSV file. "
                    "Get it with: pip install 'fulmen[tensorboard]', or pass logger=CSVLogger(...)."
                )
            return [load(LOGGERS, name, save_dir=settings.default_root_dir)]
        return [load(LOGGERS, name, save_dir=settings.default_root_dir, version=_slurm_job())]
    is_text = isinstance(cast("object", logger), str)  # which is no list of one-letter loggers
    if isinstance(logger, Iterable) and not is_text and not hasattr(logger, "log_metrics"):
        return [_checked(one) for one in logger]
    return [_checked(logger)]


def _checked(logger: object) -> Logger:
    try:
        return check(LOGGERS, logger)
    except NotConforming as error:
        raise MisconfigurationTypeError(
            f"logger={logger!r} cannot be used: {error} Pass a logger such as CSVLogger('logs'), a list of them, True "
            "or False."
        ) from error


def _slurm_job() -> str | None:
    """The batch job this process runs in: its metrics stay together when it is requeued. None elsewhere."""
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    return os.environ.get("SLURM_JOB_ID")


def follow_rank_zero(loggers: list[Logger], world: World) -> list[Logger]:
    """Rank 0 chooses each logger's version; the others take its word, and write nothing. Every rank must call it."""
    versions = [logger.version for logger in loggers] if world.is_global_zero else []
    versions = world.collectives.broadcast_object(versions)
    if world.is_global_zero:
        return loggers
    for logger, version in zip(loggers, versions, strict=True):
        if getattr(getattr(type(logger), "version", None), "fset", None) is not None:
            logger.version = version  # type: ignore[misc]  # settable where the logger says so
    return [one if isinstance(one, DummyLogger) else MutedLogger(one) for one in loggers]


def log_hyperparameters(trainer: Trainer, session: Session) -> None:
    """Tell the loggers what ``save_hyperparameters`` recorded in module and datamodule, and draw the graph.

    Raises:
        MisconfigurationException: module and datamodule have different values under one name.
    """
    if not trainer.loggers:
        return
    hparams = hyperparameters_for_loggers(session.module, session.datamodule)
    if not trainer.is_global_zero:
        return
    delivery = reporter_of(trainer).delivery
    if delivery is not None:
        if hparams is not None:
            delivery.hyperparameters(hparams, trainer.loggers)
        delivery.graph(session.module, trainer.loggers)
        delivery.save(trainer.loggers)
        delivery.settle(trainer.loggers)
        return
    for logger in trainer.loggers:
        if hparams is not None:
            logger.log_hyperparams(hparams)
        if supports(logger, SupportsGraph):
            logger.log_graph(session.module)
        logger.save()
