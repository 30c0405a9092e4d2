"""The list of callbacks: the user's, the defaults nobody asked to leave out, and the module's own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpoint import Checkpoint
from fulmen.callbacks.model_checkpoint import ModelCheckpoint
from fulmen.callbacks.model_summary import ModelSummary
from fulmen.callbacks.progress import ProgressBar
from fulmen.callbacks.timer import Timer
from fulmen.hooks import check_hook_names
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_protocols import (
    CALLBACKS,
    HOOKS,
    FulmenError,
    MisconfigurationException,
    MisconfigurationRuntimeError,
    available,
    load_factory,
)
from fulmen_protocols.discovery import entry_points, origin

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.settings import Settings
    from fulmen.trainer import Trainer

__all__ = ["as_list", "attach_to", "complete", "has_timer", "let_log", "tell_configured", "tell_exception"]


def as_list(callbacks: object) -> list[Any]:
    """One callback, several or None as a new list."""
    if callbacks is None:
        return []
    if isinstance(callbacks, Sequence) and not isinstance(callbacks, str):
        return list(cast("Sequence[object]", callbacks))
    return [callbacks]


def has_timer(callbacks: Sequence[object]) -> bool:
    """Whether a Timer limits the run."""
    return any(isinstance(c, Timer) for c in callbacks)


def complete(given: list[Any], settings: Settings) -> list[Any]:
    """Add the defaults and what installed packages supply; tuners come first and checkpoint callbacks last.

    Raises:
        MisconfigurationException: a callback contradicts a flag, or two stateful ones share a state key.
    """
    problems = [
        f"callbacks holds {what}. Give an object whose class derives from fulmen.Callback, such as Timer()."
        for callback in given
        if (what := _is_no_callback(callback))
    ]
    callbacks = list(given)
    checkpoints = [c for c in callbacks if isinstance(c, Checkpoint)]
    bars = [c for c in callbacks if isinstance(c, ProgressBar)]
    if checkpoints and not settings.enable_checkpointing:
        why = "barebones=True" if settings.barebones else "enable_checkpointing=False"
        problems.append(f"callbacks holds a {type(checkpoints[0]).__name__}, but {why}. Drop one of the two.")
    if bars and not settings.enable_progress_bar:
        why = "barebones=True" if settings.barebones else "enable_progress_bar=False"
        problems.append(f"callbacks holds a {type(bars[0]).__name__}, but {why}. Drop one of the two.")
    if len(bars) > 1:
        names = ", ".join(type(bar).__name__ for bar in bars)
        problems.append(f"callbacks holds {len(bars)} progress bars ({names}); keep one.")
    if problems:
        raise MisconfigurationException(" ".join(problems))

    if settings.max_time is not None and not has_timer(callbacks):
        callbacks.append(Timer(settings.max_time, interval="step"))
    if settings.enable_progress_bar and not bars:
        callbacks.append(_default_bar())
    if settings.enable_model_summary and not any(isinstance(c, ModelSummary) for c in callbacks):
        callbacks.append(_default_summary())
    if settings.enable_checkpointing and not checkpoints:
        callbacks.append(ModelCheckpoint())
    _require_own_keys(callbacks)
    for name in available(CALLBACKS):
        callbacks += _installed(name, callbacks)
    return _ordered(callbacks)


def _installed(name: str, others: list[Any]) -> list[Any]:
    """What the entry point ``name`` supplies; nothing, with a warning, where that cannot run beside ``others``."""
    supplied: list[Any] = []
    try:
        factory: Any = load_factory(CALLBACKS, name)
        supplied = as_list(factory())
        wrong = [what for callback in supplied if (what := _is_no_callback(callback))]
        problems = [f"its factory gave {what}." for what in wrong] or check_hook_names(supplied)
        if not problems:
            _require_own_keys([*others, *supplied])
            if sum(isinstance(callback, ProgressBar) for callback in (*others, *supplied)) > 1:
                problems = ["it is a second progress bar."]
    # A package that happens to be installed may raise anything, and must not stop a run that did not ask for it.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        problems = [str(error) if isinstance(error, FulmenError) else f"{type(error).__name__}: {error}"]
    if not problems:
        return supplied
    rank_zero_warn(
        f"the callback {name!r} of {origin(entry_points(CALLBACKS.group)[name])} is left out: {' '.join(problems)} "
        "Update or uninstall that distribution."
    )
    return []


def _is_no_callback(callback: object) -> str | None:
    """What ``callback`` is that it can be none; None if it may be one."""
    if isinstance(callback, type):
        return f"the class {callback.__name__}, not an instance"
    if not any(callable(getattr(callback, hook, None)) for hook in HOOKS):
        return f"{callback!r}, which has no hook"
    return None


def let_log(callbacks: Sequence[object], module: LightningModule) -> None:
    """Give callbacks the module's ``log`` and ``log_dict``, except those that have their own."""
    for callback in callbacks:
        for name in ("log", "log_dict"):
            if not hasattr(type(callback), name) and hasattr(callback, "__dict__"):
                setattr(callback, name, getattr(module, name))


def tell_configured(callbacks: Sequence[object], trainer: Trainer, module: LightningModule) -> None:
    """Call ``after_configure_model(trainer, pl_module)`` of the callbacks that have it.

    It is no hook of Lightning's: the model has all its layers and neither weights from a checkpoint nor optimizers.
    """
    for callback in callbacks:
        hook = getattr(callback, "after_configure_model", None)
        if hook is not None:
            hook(trainer, module)


def _default_bar() -> ProgressBar:
    from fulmen.callbacks.progress import RichProgressBar, TQDMProgressBar
    from fulmen.callbacks.progress._bars import in_notebook

    # Rich redraws nothing in a notebook's text, which is all that is there without ipywidgets and in forked processes.
    return RichProgressBar() if find_spec("rich") is not None and not in_notebook() else TQDMProgressBar()


def _default_summary() -> ModelSummary:
    if find_spec("rich") is not None:
        from fulmen.callbacks.rich_model_summary import RichModelSummary

        return RichModelSummary()
    return ModelSummary()


def _ordered(callbacks: list[Any]) -> list[Any]:
    """Those that run first, the others, checkpoints; within each the order that was given."""

    def place(callback: object) -> int:
        return 2 if isinstance(callback, Checkpoint) else int(getattr(callback, "runs_first", False) is not True)

    return sorted(callbacks, key=place)


def _require_own_keys(callbacks: Sequence[object]) -> None:
    seen: dict[str, object] = {}
    for callback in callbacks:
        key = getattr(callback, "state_key", None)
        if key is None or not _is_stateful(callback):
            continue
        if key in seen:
            raise MisconfigurationRuntimeError(
                f"two callbacks have the state key {key!r} ({type(seen[key]).__name__} and {type(callback).__name__}), "
                "so a checkpoint could not tell their states apart. "
                "Give them different arguments, or override state_key."
            )
        seen[key] = callback


def _is_stateful(callback: object) -> bool:
    method = getattr(type(callback), "state_dict", None)
    return method is not None and method is not Callback.state_dict


def tell_exception(
    callbacks: Sequence[object], trainer: Trainer, module: LightningModule, error: BaseException
) -> None:
    """Call every ``on_exception``. One that fails, too, is noted on ``error``, which stays what the caller sees."""
    for callback in callbacks:
        handler = getattr(callback, "on_exception", None)
        if handler is None:
            continue
        try:
            handler(trainer, module, error)
        except Exception as second:  # noqa: BLE001  a user's hook may raise anything
            name = type(callback).__name__
            error.add_note(f"fulmen: {name}.on_exception failed as well: {type(second).__name__}: {second}")


def attach_to(callbacks: list[Any], own: Sequence[object]) -> None:
    """Let the module's ``configure_callbacks`` replace callbacks of the same or a parent class, in place.

    ``Callback`` itself is everybody's parent and is not replaced.
    """
    if not own:
        return
    kinds = tuple(type(callback) for callback in own)

    def is_replaced(callback: object) -> bool:
        kind = type(callback)
        return kind is not Callback and any(issubclass(new, kind) for new in kinds) and callback not in own

    replaced = [type(callback).__name__ for callback in callbacks if is_replaced(callback)]
    kept = [callback for callback in callbacks if not is_replaced(callback)]
    if replaced:
        rank_zero_info(
            f"configure_callbacks: {', '.join(kind.__name__ for kind in kinds)} of the module replace the Trainer's "
            f"{', '.join(replaced)}."
        )
    callbacks[:] = _ordered([*kept, *(c for c in own if c not in kept)])
    _require_own_keys(callbacks)
