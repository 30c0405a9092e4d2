"""What a Trainer's calls put into the run's log, and where that lies."""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fulmen import _files
from fulmen._memory import host_memory_bytes
from fulmen._reporting import reporter_of
from fulmen._silent import DummyLogger
from fulmen.runlog._delivery import Delivery
from fulmen.runlog._record import FILE, REPORT_FILE, plain
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_protocols import BackendUnavailable

if TYPE_CHECKING:
    from fulmen._session import Session
    from fulmen.callbacks.model_checkpoint import ModelCheckpoint
    from fulmen.trainer import Trainer
    from fulmen_protocols import LoggerStatus

__all__ = ["begin", "checkpoint_saved", "end", "folder_of"]

_MEMORY_EVERY_S = 1.0


def folder_of(trainer: Trainer) -> str:
    """The run's folder on this machine: the first logger's, or where its checkpoints would go."""
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if isinstance(folder, str) and folder and _files.is_local(folder):
            return _files.absolute(folder)
    first = trainer.loggers[0]
    root = cast("str | os.PathLike[str]", getattr(first, "save_dir", None) or trainer.default_root_dir)
    if not _files.is_local(root):
        root = trainer.default_root_dir if _files.is_local(trainer.default_root_dir) else os.getcwd()
    run = first.version
    name = None
    with suppress(BackendUnavailable):  # a run that is known needs no server to have a folder
        name = first.name
    parts = (name, run if run is None or isinstance(run, str) else f"version_{run}")
    return _files.join(_files.absolute(root), *(str(part) for part in parts if part not in (None, "")))


def begin(trainer: Trainer, session: Session) -> None:
    """Open the run's log on rank 0, unless there is nobody who would be told anything."""
    reporter = reporter_of(trainer)
    loggers = [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]
    if not trainer.is_global_zero or not loggers:
        reporter.delivery = None
        return
    delivery = reporter.delivery
    if delivery is None:
        delivery = Delivery(trainer.log_delivery, _is_silent)
    delivery.use(trainer.log_delivery)
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    delivery.begin(
        os.path.join(folder_of(trainer), FILE),
        loggers,
        _about(trainer, session),
        lambda: progress.stepped_batches,
        _Sampler(trainer, session),
        partial(_waited_s, trainer, session),
    )
    delivery.enter("setup")
    reporter.delivery = delivery


def checkpoint_saved(trainer: Trainer, callback: ModelCheckpoint) -> None:
    """Note a checkpoint that is there, and tell the loggers that take checkpoints, on rank 0."""
    delivery = reporter_of(trainer).delivery
    if delivery is None:
        return
    score = callback.current_score
    best = callback.best_model_path
    about = {
        "path": callback._last_checkpoint_saved,  # pyright: ignore[reportPrivateUsage]
        "at": trainer._progress.stepped_batches,  # pyright: ignore[reportPrivateUsage]
        "epoch": trainer.current_epoch,
        "monitor": callback.monitor,
        "score": None if score is None else float(score),
        "best": best or None,
        "best_score": None if callback.best_model_score is None else float(callback.best_model_score),
    }
    delivery.checkpoint(callback, trainer.loggers, cast("dict[str, object]", plain(about)))


def end(trainer: Trainer, status: LoggerStatus, error: BaseException | None = None) -> None:
    """Finalize the loggers on rank 0; write the run's page."""
    if not trainer.is_global_zero:
        return
    reporter = reporter_of(trainer)
    with nullcontext() if error is None else suppress(RuntimeError):  # of a device that failed no value comes any more
        reporter.settle()
    delivery = reporter.delivery
    if delivery is None or not delivery.is_open:
        for logger in trainer.loggers:
            try:
                logger.finalize(status)
            except Exception as another:
                if error is None:
                    raise
                error.add_note(f"fulmen: {type(logger).__name__}.finalize failed as well: {another}")
        return
    try:
        delivery.end(status, trainer.loggers, error)
    except Exception as another:  # a warning that was made an error, say
        if error is None:
            raise
        error.add_note(f"fulmen: the end of the run's log failed as well: {another}")
    if trainer.log_delivery.report and delivery.log is not None:
        _write_report(delivery.log.path, delivery.mentioned)


def _waited_s(trainer: Trainer, session: Session) -> float:
    wait = None if session.data_waits is None else trainer.data_wait
    return 0.0 if wait is None else wait.waited_s


def _is_silent(logger: object) -> bool:
    return isinstance(logger, DummyLogger)


def _write_report(log_path: str, mentioned: set[str]) -> None:
    # Here because only the end of a run needs it.
    from fulmen.runlog._report import write_report

    try:
        path = write_report(log_path)
    except Exception as error:  # noqa: BLE001 - a page must not make a run fail that has succeeded
        rank_zero_warn(
            f"the page {os.path.join(os.path.dirname(log_path), REPORT_FILE)!r} could not be written: "
            f"{type(error).__name__}: {error}. Try again with: fulmen log report {os.path.dirname(log_path)}"
        )
    else:
        if str(path) not in mentioned:  # a test after the fit belongs to the same page
            mentioned.add(str(path))
            rank_zero_info(f"report: {path}")


def _about(trainer: Trainer, session: Session) -> dict[str, object]:
    assembly = trainer.assembly
    settings = {
        field.name: value
        for field in fields(trainer.settings)
        if (value := getattr(trainer.settings, field.name)) is None or isinstance(value, (bool, int, float, str))
    }
    return {
        "fn": session.fn.value,
        "module": f"{type(session.module).__module__}.{type(session.module).__qualname__}",
        "parameters": sum(_numel(p) for p in session.module.parameters()),
        "trainable": sum(_numel(p) for p in session.module.parameters() if p.requires_grad),
        "world_size": trainer.world_size,
        "accelerator": assembly.accelerator_name,
        "device": _device_name(trainer.world.device),
        "strategy": assembly.strategy_name,
        "precision": str(trainer.precision),
        "command": [os.path.basename(sys.executable), *sys.argv],
        "folder": os.getcwd(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "pid": os.getpid(),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in ("fulmen", "torch") if (found := _version(name)) is not None},
        },
        "settings": settings,
        "loggers": [f"{type(logger).__module__}.{type(logger).__qualname__}" for logger in trainer.loggers],
    }


def _numel(parameter: Tensor) -> int:
    return 0 if torch.nn.parameter.is_lazy(parameter) else parameter.numel()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


class _Sampler:
    """Learning rates, and memory once a second: what the host knows without asking the device."""

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._session = session
        self._is_cuda = trainer.world.device.type == "cuda"
        self._peak = partial(torch.cuda.max_memory_allocated, trainer.world.device)
        self._memory_at = 0.0

    def __call__(self) -> dict[str, object]:
        found: dict[str, object] = {"lr": self._learning_rates()}
        now = time.monotonic()
        if now - self._memory_at >= _MEMORY_EVERY_S:
            self._memory_at = now
            memory: dict[str, int] = {}
            if (host := host_memory_bytes()) is not None:
                memory["host"] = host
            if self._is_cuda:
                memory["device_peak"] = self._peak()
            found["memory"] = memory
        return found

    def _learning_rates(self) -> dict[str, float]:
        rates: dict[str, float] = {}
        for index, optimizer in enumerate(self._session.optimizers):
            for number, group in enumerate(optimizer.param_groups):
                rate = group.get("lr")
                if isinstance(rate, Tensor):
                    if rate.device.type != "cpu":
                        continue  # reading it would make the host wait for the device
                    rate = float(rate)
                if rate is None:
                    continue
                name = type(optimizer).__name__ if not index else f"{type(optimizer).__name__}-{index}"
                rates[name if len(optimizer.param_groups) == 1 else f"{name}/group{number}"] = float(rate)
        return rates
