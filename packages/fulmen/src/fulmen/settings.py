"""Settings: the Trainer's arguments that are no backend, checked and completed before anything starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import NoneType
from typing import Literal, TypeVar, cast

from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

__all__ = ["BatchLimit", "Interval", "Settings"]

N = TypeVar("N", int, float)
BatchLimit = int | float
Interval = int | float | str | timedelta | Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """The completed arguments of a Trainer."""

    fast_dev_run: int
    """Batches of every loop in a quick run; 0: off."""
    max_epochs: int
    min_epochs: int
    max_steps: int
    min_steps: int
    max_time: timedelta | None
    limit_train_batches: BatchLimit
    limit_val_batches: BatchLimit
    limit_test_batches: BatchLimit
    limit_predict_batches: BatchLimit
    overfit_batches: BatchLimit
    val_check_interval: int | float | timedelta
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: float
    log_every_n_steps: int
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    accumulate_grad_batches: int
    loss_weighting: Literal["mean", "weights"]
    gradient_clip_val: float | None
    gradient_clip_algorithm: Literal["norm", "value"]
    deterministic: bool | Literal["warn"]
    benchmark: bool | None
    inference_mode: bool
    use_distributed_sampler: bool
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: int
    default_root_dir: str
    enable_autolog_hparams: bool
    max_epochs_is_default: bool
    """Nobody gave a limit: 1,000 epochs are assumed, and said so."""

    @classmethod
    def parse(
        cls,
        *,
        fast_dev_run: int | bool,
        max_epochs: int | None,
        min_epochs: int | None,
        max_steps: int,
        min_steps: int | None,
        max_time: str | timedelta | Mapping[str, int] | None,
        limit_train_batches: BatchLimit | None,
        limit_val_batches: BatchLimit | None,
        limit_test_batches: BatchLimit | None,
        limit_predict_batches: BatchLimit | None,
        overfit_batches: BatchLimit,
        val_check_interval: Interval | None,
        check_val_every_n_epoch: int | None,
        num_sanity_val_steps: int | None,
        log_every_n_steps: int | None,
        enable_checkpointing: bool | None,
        enable_progress_bar: bool | None,
        enable_model_summary: bool | None,
        accumulate_grad_batches: int,
        loss_weighting: str | None,
        gradient_clip_val: float | None,
        gradient_clip_algorithm: str | None,
        deterministic: bool | Literal["warn"] | None,
        benchmark: bool | None,
        inference_mode: bool,
        use_distributed_sampler: bool,
        detect_anomaly: bool,
        barebones: bool,
        sync_batchnorm: bool,
        reload_dataloaders_every_n_epochs: int,
        default_root_dir: str | os.PathLike[str] | None,
        enable_autolog_hparams: bool,
        logger_is_on: bool | None,
        has_timer: bool,
    ) -> Settings:
        """Check every argument and complete the missing ones.

        Raises:
            MisconfigurationException: with one sentence for each argument that is wrong.
            MisconfigurationTypeError: the same, when every problem is a wrong type.
        """
        wrong = _Problems()
        if barebones:
            wrong.turned_off(
                "barebones=True",
                enable_checkpointing=enable_checkpointing,
                enable_progress_bar=enable_progress_bar,
                enable_model_summary=enable_model_summary,
                logger=logger_is_on,
                num_sanity_val_steps=num_sanity_val_steps,
                log_every_n_steps=log_every_n_steps,
                fast_dev_run=fast_dev_run,
                detect_anomaly=detect_anomaly,
            )
            enable_checkpointing = enable_progress_bar = enable_model_summary = False
            num_sanity_val_steps = log_every_n_steps = 0

        fast = _fast_dev_run(fast_dev_run, wrong)
        wrong.whole_numbers(-1, max_epochs=max_epochs, max_steps=max_steps, num_sanity_val_steps=num_sanity_val_steps)
        wrong.whole_numbers(
            0,
            min_epochs=min_epochs,
            min_steps=min_steps,
            log_every_n_steps=log_every_n_steps,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
        )
        wrong.whole_numbers(
            1, accumulate_grad_batches=accumulate_grad_batches, check_val_every_n_epoch=check_val_every_n_epoch
        )
        wrong.limits(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
        )
        wrong.clipping(gradient_clip_val, gradient_clip_algorithm)
        if loss_weighting not in (None, "mean", "weights"):
            wrong.add(
                f"loss_weighting={loss_weighting!r} must be 'mean' (training_step returns a mean; the default) or "
                "'weights' (it returns a sum under 'loss' and the number of summed things under 'weight')."
            )
        if deterministic not in (None, True, False, "warn"):
            wrong.add(f"deterministic={deterministic!r} must be True, False or 'warn'.")
        wrong.switches(
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            benchmark=benchmark,
            inference_mode=inference_mode,
            use_distributed_sampler=use_distributed_sampler,
            detect_anomaly=detect_anomaly,
            barebones=barebones,
            sync_batchnorm=sync_batchnorm,
            enable_autolog_hparams=enable_autolog_hparams,
        )
        root_dir = _root_dir(default_root_dir, wrong)
        interval = _val_check_interval(val_check_interval, check_val_every_n_epoch, wrong)
        duration = None if max_time is None else wrong.duration("max_time", max_time)
        wrong.raise_all()

        is_default = not fast and max_epochs is None and max_steps == -1 and duration is None and not has_timer
        if fast:
            max_epochs, max_steps = 1, fast
            num_sanity_val_steps, interval = 0, 1.0
            check_val_every_n_epoch = 1
            limit_train_batches = limit_val_batches = limit_test_batches = limit_predict_batches = fast
        if overfit_batches:
            limit_train_batches = limit_val_batches = overfit_batches
        if max_epochs is None:
            max_epochs = 1000 if is_default else -1
        if min_epochs is None:
            min_epochs = 1 if min_steps is not None else 0
        return cls(
            fast_dev_run=fast,
            max_epochs=max_epochs,
            min_epochs=min_epochs,
            max_steps=max_steps,
            min_steps=min_steps or 0,
            max_time=duration,
            limit_train_batches=_or(limit_train_batches, 1.0),
            limit_val_batches=_or(limit_val_batches, 1.0),
            limit_test_batches=_or(limit_test_batches, 1.0),
            limit_predict_batches=_or(limit_predict_batches, 1.0),
            overfit_batches=overfit_batches,
            val_check_interval=interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
            num_sanity_val_steps=_or(num_sanity_val_steps, 2) if num_sanity_val_steps != -1 else math.inf,
            log_every_n_steps=_or(log_every_n_steps, 50),
            enable_checkpointing=enable_checkpointing is not False,
            enable_progress_bar=enable_progress_bar is not False,
            enable_model_summary=enable_model_summary is not False,
            accumulate_grad_batches=accumulate_grad_batches,
            loss_weighting="weights" if loss_weighting == "weights" else "mean",
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm="value" if gradient_clip_algorithm == "value" else "norm",
            deterministic=deterministic or False,
            benchmark=benchmark,
            inference_mode=inference_mode,
            use_distributed_sampler=use_distributed_sampler,
            detect_anomaly=detect_anomaly,
            barebones=barebones,
            sync_batchnorm=sync_batchnorm,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            default_root_dir=root_dir,
            enable_autolog_hparams=enable_autolog_hparams,
            max_epochs_is_default=is_default,
        )


def _or(value: N | None, default: N) -> N:
    return default if value is None else value


def _root_dir(path: object, wrong: _Problems) -> str:
    if path is None:
        return os.getcwd()
    if not isinstance(path, (str, os.PathLike)):
        wrong.type(f"default_root_dir={path!r} must be a path or a URL.")
        return ""
    text = os.fspath(cast("str | os.PathLike[str]", path))
    return text if "://" in text else os.path.normpath(os.path.expanduser(text))


def _fast_dev_run(value: object, wrong: _Problems) -> int:
    if not isinstance(value, int):  # True is one, too
        wrong.type(f"fast_dev_run={value!r} must be True, False or a number of batches.")
        return 0
    if value < 0:
        wrong.add(f"fast_dev_run={value!r} must be at least 0: it is the number of batches of every loop.")
    return int(value)


def _val_check_interval(
    value: Interval | None, every_n_epochs: int | None, wrong: _Problems
) -> int | float | timedelta:
    if value is None:
        value = 1.0
    if isinstance(value, bool):
        wrong.type(f"val_check_interval={value!r} must be a number of batches, a fraction of an epoch or a duration.")
    elif isinstance(value, int):
        if value < 1:
            wrong.add(
                f"val_check_interval={value!r} must be at least 1 batch; limit_val_batches=0 turns validation off."
            )
        return value
    elif isinstance(value, float):
        if not 0.0 < value <= 1.0:
            wrong.add(f"val_check_interval={value!r}: a float is a fraction of the epoch and must lie in (0, 1].")
        elif every_n_epochs is None and value != 1.0:
            wrong.add(
                f"val_check_interval={value!r} is a fraction of an epoch, but check_val_every_n_epoch=None counts "
                "across epochs. Give a number of batches or a duration."
            )
        return value
    else:
        return wrong.duration("val_check_interval", value) or 1.0
    return 1.0


def parse_duration(name: str, value: object) -> timedelta:
    """Turn ``"DD:HH:MM:SS"``, a timedelta or its keyword arguments into a timedelta.

    Raises:
        MisconfigurationException: it is none of these, or not positive.
    """
    result: timedelta | None = None
    if isinstance(value, timedelta):
        result = value
    elif isinstance(value, str):
        parts = value.split(":")
        if len(parts) == 4 and all(part.isdigit() for part in parts):
            days, hours, minutes, seconds = map(int, parts)
            if hours < 24 and minutes < 60 and seconds < 60:
                result = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, Mapping):
        try:
            result = timedelta(**cast("Mapping[str, float]", value))
        except TypeError as error:
            raise MisconfigurationException(f"{name}={value!r} does not name a duration: {error}.") from error
    if result is None or result <= timedelta(0):
        raise MisconfigurationException(
            f"{name}={value!r} is no duration. Give 'DD:HH:MM:SS', a positive timedelta, or its arguments as a dict."
        )
    return result


class _Problems:
    """Collects what is wrong with arguments, to say it all at once."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._values = False

    def add(self, message: str) -> None:
        self._messages.append(message)
        self._values = True

    def type(self, message: str) -> None:
        self._messages.append(message)

    def turned_off(self, by: str, **given: object) -> None:
        """Refuse what was asked for and cannot be had together with ``by``."""
        for name, value in given.items():
            if value:
                self.add(f"{by} turns {name} off, but it was given as {value!r}; drop one of the two.")

    def whole_numbers(self, low: int, **given: object) -> None:
        for name, value in given.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                self.type(f"{name}={value!r} must be a whole number.")
            elif value < low:
                unlimited = "; -1 means no limit" if low == -1 and name.startswith("max") else ""
                self.add(f"{name}={value!r} must be at least {low}{unlimited}.")

    def switches(self, **given: object) -> None:
        for name, value in given.items():
            if value is not None and not isinstance(value, int):  # 0 and 1 are fine
                self.type(f"{name}={value!r} must be True or False.")

    def limits(self, **given: object) -> None:
        for name, value in given.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self.type(f"{name}={value!r} must be a number of batches (int) or a fraction (float).")
            elif isinstance(value, float) and not 0.0 <= value <= 1.0:
                self.add(
                    f"{name}={value!r}: a float is a fraction and must lie in [0, 1]; write {int(value)} for batches."
                )
            elif value < 0:
                self.add(f"{name}={value!r} must not be negative; 0 turns the loop off.")

    def clipping(self, value: object, algorithm: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float, NoneType)):
            self.type(f"gradient_clip_val={value!r} must be a number.")
        elif value is not None and not math.isfinite(value):
            self.add(f"gradient_clip_val={value!r} must be finite; None turns clipping off.")
        if algorithm not in (None, "norm", "value"):
            self.add(f"gradient_clip_algorithm={algorithm!r} must be 'norm' or 'value'.")

    def duration(self, name: str, value: object) -> timedelta | None:
        try:
            return parse_duration(name, value)
        except MisconfigurationException as error:
            self.add(str(error))
            return None

    def raise_all(self) -> None:
        if self._messages:
            kind = MisconfigurationException if self._values else MisconfigurationTypeError
            raise kind(" ".join(self._messages))
