"""Hooks: for each event of a run, the callables that really do something there.

Built once per call, before the first batch. A hook that nobody overrides is an empty tuple, so it costs an empty loop.
Callbacks come first, in their order, then the module; callbacks that watch metrics come last at the end of a training
epoch, so that they see what the module logged there. Arguments that Lightning gives (``trainer``, ``pl_module``) are
bound here, so the loops hold no Trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpoint import Checkpoint
from fulmen.callbacks.early_stopping import EarlyStopping
from fulmen.module import LightningModule
from fulmen_protocols import HOOKS, did_you_mean

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

__all__ = ["EvalHooks", "FitHooks", "Hook", "HookBinder"]

Hook = tuple[Callable[..., Any], ...]


@dataclass(frozen=True, slots=True)
class FitHooks:
    """Events of training. The arguments are those a LightningModule's hook gets."""

    on_train_start: Hook = ()
    on_train_epoch_start: Hook = ()
    on_train_batch_start: Hook = ()
    """Callbacks': what they return is ignored."""
    module_on_train_batch_start: Hook = ()
    """The module's: -1 leaves out the rest of the epoch."""
    on_train_batch_end: Hook = ()
    on_train_epoch_end: Hook = ()
    on_train_end: Hook = ()


@dataclass(frozen=True, slots=True)
class EvalHooks:
    """Events of validation, test or prediction. Batch hooks get ``dataloader_idx`` where there are several loaders."""

    on_model_eval: Hook = ()
    on_start: Hook = ()
    on_epoch_start: Hook = ()
    on_batch_start: Hook = ()
    on_batch_end: Hook = ()
    on_epoch_end: Hook = ()
    on_end: Hook = ()
    on_model_train: Hook = ()


@dataclass(frozen=True)
class HookBinder:
    """Collects the overridden hooks of one run's callbacks and module and binds their leading arguments."""

    trainer: Trainer
    module: LightningModule
    callbacks: Sequence[object]
    scoped: Callable[..., Callable[..., Any]]
    """``(name, hook, owner)``: wraps a hook so that ``self.log`` inside it knows where it is called."""

    def of_callbacks(self, name: str, callbacks: Iterable[object] | None = None) -> Hook:
        """The callbacks' own versions of ``name``, called without ``trainer`` and ``pl_module``."""
        found: list[Callable[..., Any]] = []
        for callback in self.callbacks if callbacks is None else callbacks:
            method = getattr(callback, name, None)
            if method is None or getattr(method, "__func__", method) is getattr(Callback, name, None):
                continue
            if getattr(callback, "_" + name + "_is_idle", False):
                continue  # the callback knows that it has nothing to do there in this run
            found.append(self.scoped(name, partial(method, self.trainer, self.module), callback))
        return tuple(found)

    def of_module(self, name: str) -> Hook:
        """The module's own version of ``name``, if it has one."""
        method = self.overridden(name)
        return () if method is None else (self.scoped(name, method),)

    def overridden(self, name: str) -> Callable[..., Any] | None:
        """The module's method ``name``, or None when it is LightningModule's own."""
        method = getattr(self.module, name, None)
        if method is None or getattr(method, "__func__", method) is getattr(LightningModule, name, None):
            return None
        return method  # type: ignore[no-any-return]  # user-facing hooks are Any

    def both(self, name: str) -> Hook:
        """Callbacks first, then the module."""
        return self.of_callbacks(name) + self.of_module(name)

    def fit(self, *, before_watching: Hook = ()) -> FitHooks:
        """The events of training.

        Args:
            before_watching: called between the module's ``on_train_epoch_end`` and the callbacks that watch metrics.
        """
        watching = [c for c in self.callbacks if isinstance(c, (Checkpoint, EarlyStopping))]
        others = [c for c in self.callbacks if not isinstance(c, (Checkpoint, EarlyStopping))]
        end = "on_train_epoch_end"
        return FitHooks(
            on_train_start=self.both("on_train_start"),
            on_train_epoch_start=self.both("on_train_epoch_start"),
            on_train_batch_start=self.of_callbacks("on_train_batch_start"),
            module_on_train_batch_start=self.of_module("on_train_batch_start"),
            on_train_batch_end=self.both("on_train_batch_end"),
            on_train_epoch_end=(
                *self.of_callbacks(end, others),
                *self.of_module(end),
                *before_watching,
                *self.of_callbacks(end, watching),
            ),
            on_train_end=self.both("on_train_end"),
        )

    def evaluation(self, stage: str, *, several_loaders: bool) -> EvalHooks:
        """The events of ``stage``: ``validation``, ``test`` or ``predict``."""
        batch_start = self._batch_hooks(f"on_{stage}_batch_start", several_loaders)
        batch_end = self._batch_hooks(f"on_{stage}_batch_end", several_loaders)
        return EvalHooks(
            on_model_eval=self.of_module(f"on_{stage}_model_eval"),
            on_start=self.both(f"on_{stage}_start"),
            on_epoch_start=self.both(f"on_{stage}_epoch_start"),
            on_batch_start=batch_start,
            on_batch_end=batch_end,
            on_epoch_end=self.both(f"on_{stage}_epoch_end"),
            on_end=self.both(f"on_{stage}_end"),
            on_model_train=self.of_module(f"on_{stage}_model_train"),
        )

    def _batch_hooks(self, name: str, several_loaders: bool) -> Hook:
        """The batch hooks of ``name``, each called with ``dataloader_idx`` last.

        A hook may leave that argument out where there is one loader.
        """
        bound: list[Callable[..., Any]] = []
        for hook, method in (*self._named(name), *((h, self.overridden(name)) for h in self.of_module(name))):
            takes_index = _takes(method, "dataloader_idx")
            bound.append(hook if several_loaders or takes_index else _without_last(hook))
        return tuple(bound)

    def _named(self, name: str) -> Iterable[tuple[Callable[..., Any], Callable[..., Any] | None]]:
        for callback in self.callbacks:
            for hook in self.of_callbacks(name, [callback]):
                yield hook, getattr(callback, name)


def _without_last(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: object) -> Any:
        return hook(*args[:-1])

    return call


def _takes(function: Callable[..., Any] | None, name: str) -> bool:
    if function is None:
        return False
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


_GONE = {
    "on_epoch_start": "on_train_epoch_start, on_validation_epoch_start or on_test_epoch_start",
    "on_epoch_end": "on_train_epoch_end, on_validation_epoch_end or on_test_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_init_start": "setup",
    "on_init_end": "setup",
    "on_configure_sharded_model": "setup",
    "on_before_accelerator_backend_setup": "setup",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
}
"""Hooks of Lightning before 2.0, and what took their place."""


def check_hook_names(callbacks: Iterable[object]) -> list[str]:
    """What is wrong with the callbacks' hooks, one sentence each: misspelt names and hooks with too few arguments."""
    problems: list[str] = []
    for callback in callbacks:
        kind = type(callback)
        for name in dir(kind):
            if (
                not name.startswith("on_")
                or name in HOOKS
                or hasattr(Callback, name)
                or not callable(getattr(kind, name))
            ):
                continue
            hint = f" Use {_GONE[name]}." if name in _GONE else did_you_mean(name, HOOKS)
            if hint:
                problems.append(f"{kind.__name__} defines {name!r}, which is no hook of a callback.{hint}")
        for name, arguments in HOOKS.items():
            method = getattr(callback, name, None)
            if (
                method is None
                or not callable(method)
                or getattr(method, "__func__", None) is getattr(Callback, name, None)
            ):
                continue
            needed = 2 + len(arguments) - ("dataloader_idx" in arguments)  # may be left out where there is one loader
            try:
                inspect.signature(method).bind(*range(needed))
            except TypeError as error:
                expected = ", ".join(("trainer", "pl_module", *arguments))
                problems.append(f"{kind.__name__}.{name} must take ({expected}): {error}.")
            except ValueError:
                continue  # a builtin without a signature
    return problems
