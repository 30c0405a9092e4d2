"""Optimizers: what ``configure_optimizers`` may return, and the wrapper that manual optimization steps with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from fulmen_fabric import rank_zero_warn
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationTypeError,
    Optimizable,
    Stateful,
    did_you_mean,
)

__all__ = ["LRSchedulerConfig", "LightningOptimizer"]

FORMS = (
    "Allowed are: one optimizer; a list of optimizers; (optimizers, schedulers), two lists; a dict with 'optimizer' "
    "and optionally 'lr_scheduler' and 'monitor'; a list of such dicts; None."
)
OPTIMIZER_KEYS = frozenset({"optimizer", "lr_scheduler", "monitor"})
SCHEDULER_KEYS = frozenset({"scheduler", "name", "interval", "frequency", "reduce_on_plateau", "monitor", "strict"})


@dataclass
class LRSchedulerConfig:
    """A learning rate scheduler and when to step it."""

    scheduler: Any  # Any: besides torch's it may be any object that the module's lr_scheduler_step knows to step
    name: str | None = None
    """Name under which ``LearningRateMonitor`` logs it."""
    interval: Literal["epoch", "step"] = "epoch"
    """Unit of ``frequency``: epochs, or optimizer steps."""
    frequency: int = 1
    """Step it every so many units, at least 1."""
    reduce_on_plateau: bool = False
    """Whether its ``step`` takes the monitored value."""
    monitor: str | None = None
    """Name of the logged value it is given."""
    strict: bool = True
    """Whether a missing value is an error; otherwise it is a warning, and the scheduler waits."""


class NoOptimizer(Optimizer):
    """What stands in for ``configure_optimizers`` returning None: steps run their closure and change nothing."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Accept the placeholder parameter that torch insists on, and no other."""
        if not hasattr(self, "param_groups") or not self.param_groups:
            super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run ``closure``, which computes the loss and its gradients."""
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: there are no parameters."""

    def state_dict(self) -> dict[str, Any]:
        """An empty dict."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return "NoOptimizer()"


def parse_optimizers(
    returned: object, *, automatic_optimization: bool = True, steps_own_schedulers: bool = False
) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Turn what ``configure_optimizers`` returned into optimizers and scheduler settings; it is left as it is.

    Args:
        returned: an optimizer, a list of them, two lists, a dict, a list of dicts, or None.
        automatic_optimization: of the module; without it several optimizers are fine, schedulers the user's to step.
        steps_own_schedulers: whether the module overrides ``lr_scheduler_step``, so that any object can be a scheduler.

    Raises:
        MisconfigurationException: it is none of these, a scheduler's settings contradict each other, a scheduler's
            optimizer is not returned, or there are several optimizers with automatic optimization.
    """
    if returned is None:
        rank_zero_warn("configure_optimizers returned None: this run has no optimizer and changes no weight.")
        return [NoOptimizer()], []
    optimizers, schedulers, monitor = _split(returned)
    if automatic_optimization and len(optimizers) > 1:
        raise MisconfigurationException(
            f"configure_optimizers returned {len(optimizers)} optimizers, and automatic optimization steps one. "
            "Return one, or set self.automatic_optimization = False and step them in training_step."
        )
    configs = [
        _scheduler_config(item, monitor, automatic=automatic_optimization, any_object=steps_own_schedulers)
        for item in schedulers
    ]
    for config in configs:
        owner = getattr(config.scheduler, "optimizer", None)
        if owner is not None and not any(owner is optimizer for optimizer in optimizers):
            raise MisconfigurationException(
                f"configure_optimizers returned a {type(config.scheduler).__name__} of a {type(owner).__name__} that "
                "it did not return. Return that optimizer, or make the scheduler for a returned one."
            )
    return optimizers, configs


def _split(returned: object) -> tuple[list[Optimizer], list[object], str | None]:
    """Optimizers, schedulers as they were written, and the monitor of those written without one."""
    whole = returned
    if _is_optimizer(returned):
        return [cast("Optimizer", returned)], [], None
    if isinstance(returned, Mapping):
        return _split_dict(cast("Mapping[str, object]", returned))
    if not isinstance(returned, (list, tuple)):
        raise _wrong(whole, f"configure_optimizers returned a {type(returned).__name__}")
    items = cast("Sequence[object]", returned)
    if len(items) == 2 and isinstance(items[0], (list, tuple)):
        first = cast("Sequence[object]", items[0])
        for item in first:
            if not _is_optimizer(item):
                raise _wrong(whole, f"configure_optimizers returned a {type(item).__name__} among its optimizers")
        second = items[1]
        if second is None:
            return cast("list[Optimizer]", list(first)), [], None
        schedulers = list(cast("Sequence[object]", second)) if isinstance(second, (list, tuple)) else [second]
        return cast("list[Optimizer]", list(first)), schedulers, None
    if items and all(isinstance(item, Mapping) for item in items):
        optimizers: list[Optimizer] = []
        entries: list[object] = []
        for item in items:
            some, scheduled, monitor = _split_dict(cast("Mapping[str, object]", item))
            optimizers += some
            entries += [_with_monitor(entry, monitor) for entry in scheduled]
        return optimizers, entries, None
    for item in items:
        if not _is_optimizer(item):
            raise _wrong(whole, f"configure_optimizers returned a {type(item).__name__} in its list")
    if not items:
        raise _wrong(whole, "configure_optimizers returned an empty list")
    return cast("list[Optimizer]", list(items)), [], None


def _split_dict(config: Mapping[str, object]) -> tuple[list[Optimizer], list[object], str | None]:
    _warn_about_keys("configure_optimizers", config, OPTIMIZER_KEYS)
    if "optimizer" not in config:
        raise _wrong(config, f"configure_optimizers returned a dict with keys {sorted(config)!r} and no 'optimizer'")
    optimizer = config["optimizer"]
    if not _is_optimizer(optimizer):
        raise _wrong(config, f"configure_optimizers returned a {type(optimizer).__name__} as 'optimizer'")
    scheduler = config.get("lr_scheduler")
    monitor = config.get("monitor")
    if monitor is not None and not isinstance(monitor, str):
        raise MisconfigurationTypeError(
            f"configure_optimizers: 'monitor' is {monitor!r}; it is the name of a logged value."
        )
    kind = type(scheduler).__name__
    if isinstance(scheduler, (list, tuple)):
        raise MisconfigurationTypeError(
            f"configure_optimizers: 'lr_scheduler' is a {kind}; give one scheduler, or one dict. "
            "For several schedulers return two lists, (optimizers, schedulers)."
        )
    return [cast("Optimizer", optimizer)], [] if scheduler is None else [scheduler], monitor


@dataclass(frozen=True)
class _Monitored:
    """A scheduler together with the monitor that was written beside it."""

    scheduler: object
    monitor: str | None


def _with_monitor(entry: object, monitor: str | None) -> object:
    return entry if monitor is None else _Monitored(entry, monitor)


def _scheduler_config(entry: object, monitor: str | None, *, automatic: bool, any_object: bool) -> LRSchedulerConfig:
    if isinstance(entry, _Monitored):
        monitor, entry = entry.monitor, entry.scheduler
    if isinstance(entry, LRSchedulerConfig):
        given: dict[str, Any] = dict(vars(entry))
    elif isinstance(entry, Mapping):
        given = dict(cast("Mapping[str, Any]", entry))
        _warn_about_keys("the lr_scheduler dict of configure_optimizers", given, SCHEDULER_KEYS)
        if "scheduler" not in given:
            raise MisconfigurationException(
                f"configure_optimizers returned an lr_scheduler dict with keys {sorted(given)!r} and no 'scheduler'. "
                "Put the scheduler there."
            )
        given = {key: value for key, value in given.items() if key in SCHEDULER_KEYS}
    else:
        given = {"scheduler": entry}
    scheduler = given["scheduler"]
    if given.get("monitor") is None:
        given["monitor"] = monitor
    _check_scheduler(scheduler, any_object=any_object or not automatic)
    if not automatic:
        return _manual_config(given)
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    given["reduce_on_plateau"] = bool(given.get("reduce_on_plateau")) or plateau
    config = LRSchedulerConfig(**given)
    _check_config(config)
    return config


def _manual_config(given: Mapping[str, Any]) -> LRSchedulerConfig:
    ignored = [key for key in ("reduce_on_plateau", "monitor", "strict") if given.get(key) is not None]
    if ignored:
        rank_zero_warn(
            f"the lr_scheduler keys {ignored!r} do nothing with manual optimization: step it in training_step."
        )
    kept = {key: value for key, value in given.items() if key not in ("reduce_on_plateau", "monitor", "strict")}
    return LRSchedulerConfig(**kept)


def _check_scheduler(scheduler: object, *, any_object: bool) -> None:
    kind = type(scheduler).__name__
    if not isinstance(scheduler, Stateful):
        raise MisconfigurationTypeError(
            f"configure_optimizers returned a {kind} as learning rate scheduler, which lacks state_dict or "
            "load_state_dict; a checkpoint could not hold it. Give one of torch.optim.lr_scheduler, or add them."
        )
    if not any_object and not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
        raise MisconfigurationTypeError(
            f"configure_optimizers returned a {kind} as learning rate scheduler, which is not one of torch. "
            "Override lr_scheduler_step(scheduler, metric) to say how it steps."
        )


def _check_config(config: LRSchedulerConfig) -> None:
    interval, frequency = cast("object", config.interval), cast("object", config.frequency)
    if interval not in ("epoch", "step"):
        raise MisconfigurationException(f"the lr_scheduler's 'interval' is {interval!r}; it is 'epoch' or 'step'.")
    if not isinstance(frequency, int) or isinstance(frequency, bool) or frequency < 1:
        raise MisconfigurationException(
            f"the lr_scheduler's 'frequency' is {frequency!r}; it is an integer of at least 1."
        )
    if config.reduce_on_plateau and config.monitor is None:
        raise MisconfigurationException(
            f"configure_optimizers returned a {type(config.scheduler).__name__} and no 'monitor'. Name the logged "
            "value it watches: {'optimizer': ..., 'lr_scheduler': {'scheduler': ..., 'monitor': 'val_loss'}}."
        )
    if isinstance(config.scheduler, OneCycleLR) and config.interval == "epoch":
        rank_zero_warn(
            "OneCycleLR counts steps, and its interval is 'epoch': "
            "set 'interval': 'step' unless its total_steps counts epochs."
        )


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Optimizer) or (not isinstance(value, type) and isinstance(value, Optimizable))


def _warn_about_keys(place: str, config: Mapping[str, object], known: frozenset[str]) -> None:
    for key in config:
        if key not in known:
            hint = did_you_mean(str(key), known)
            rank_zero_warn(f"{place} holds the key {key!r}, which is ignored.{hint} Known: {sorted(known)!r}.")


def _wrong(returned: object, found: str) -> MisconfigurationTypeError:
    return MisconfigurationTypeError(f"{found}: {returned!r}. {FORMS}")


class LightningOptimizer:
    """An optimizer whose ``step`` goes through the Trainer: precision, strategy and hooks. For manual optimization.

    Its class derives from the wrapped optimizer's, so ``isinstance(wrapper, torch.optim.Adam)`` holds; state and every
    other attribute are the wrapped optimizer's.

    Args:
        optimizer: the one to wrap.
        step_function: called as ``step_function(closure, **kwargs)`` to step it once.
        toggle: gives the context in which only this optimizer's parameters need gradients.
        no_sync: gives the context in which gradients stay on this rank.
    """

    _optimizer: Optimizer
    _step_function: Callable[..., Any]

    def __new__(cls, optimizer: Optimizer, *args: Any, **kwargs: Any) -> LightningOptimizer:
        """An instance of the class that derives from the wrapped optimizer's."""
        return cast(
            "LightningOptimizer",
            object.__new__(_wrapper_class(cast("Hashable", cls), cast("Hashable", type(optimizer)))),
        )

    def __init__(
        self,
        optimizer: Optimizer,
        step_function: Callable[..., Any],
        *,
        toggle: Callable[[Optimizer], AbstractContextManager[object]] | None = None,
        no_sync: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        own = self.__dict__
        own["_optimizer"] = optimizer
        own["_step_function"] = step_function
        own["_toggle"] = toggle
        own["_no_sync"] = no_sync

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step once and return what the optimizer returns.

        Args:
            closure: evaluates the loss again and returns it, for optimizers that need that.
            kwargs: for the optimizer's own ``step``.

        Raises:
            MisconfigurationTypeError: ``closure`` cannot be called.
        """
        if closure is not None and not callable(closure):
            raise MisconfigurationTypeError(f"optimizer.step got {closure!r} as closure, which cannot be called.")
        return self._step_function(closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None, None, None]:
        """Within the block only this optimizer's parameters need gradients.

        Args:
            sync_grad: False leaves gradients on this rank, for all but the last backward of an accumulation.
        """
        toggle, no_sync = self.__dict__["_toggle"], self.__dict__["_no_sync"]
        held_back = nullcontext() if sync_grad or no_sync is None else no_sync()
        with nullcontext() if toggle is None else toggle(self._optimizer), held_back:
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self._optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the wrapped optimizer."""
        self._optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add to the wrapped optimizer."""
        self._optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # while being copied the wrapper is empty
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # ``step`` stays on the wrapper: a scheduler made for it replaces that method, to count calls.
        setattr_on = self if name == "step" or name in self.__dict__ else self._optimizer
        object.__setattr__(setattr_on, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        own = self.__dict__
        return _rebuild, (self._optimizer, self._step_function, own["_toggle"], own["_no_sync"])

    def __repr__(self) -> str:
        return f"Lightning{self._optimizer!r}"


@cache
def _wrapper_class(wrapper: Hashable, wrapped: Hashable) -> type:
    bases = cast("tuple[type, type]", (wrapper, wrapped))  # mypy takes no class for Hashable
    return type(f"Lightning{bases[1].__name__}", bases, {"__module__": bases[0].__module__})


def _rebuild(optimizer: Optimizer, step_function: Any, toggle: Any, no_sync: Any) -> LightningOptimizer:
    return LightningOptimizer(optimizer, step_function, toggle=toggle, no_sync=no_sync)
