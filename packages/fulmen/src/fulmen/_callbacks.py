"""The list of callbacks: the user's, the defaults nobody asked to leave out, and the module's own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from fulmen.callbacks.checkpoint import Checkpoint
from fulmen.callbacks.model_checkpoint import ModelCheckpoint
from fulmen.callbacks.model_summary import ModelSummary
from fulmen.callbacks.progress import ProgressBar
from fulmen.callbacks.timer import Timer
from fulmen_fabric import rank_zero_info
from fulmen_protocols import CALLBACKS, MisconfigurationException, available, load_factory

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.settings import Settings

__all__ = ["as_list", "attach_to", "complete", "has_timer", "let_log"]


def as_list(callbacks: object) -> list[Any]:
    """One callback, several or None as a new list."""
    if callbacks is None:
        return []
    if isinstance(callbacks, Sequence):
        return list(cast("Sequence[object]", callbacks))
    return [callbacks]


def has_timer(callbacks: Sequence[object]) -> bool:
    """Whether a Timer limits the run."""
    return any(isinstance(c, Timer) for c in callbacks)


def complete(given: list[Any], settings: Settings) -> list[Any]:
    """Add the defaults and the installed plugins, and put checkpoint callbacks last.

    Raises:
        MisconfigurationException: a callback contradicts a flag, or two stateful ones share a state key.
    """
    problems: list[str] = []
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
    for name in available(CALLBACKS):
        factory: Any = load_factory(CALLBACKS, name)
        callbacks.extend(as_list(factory()))
    callbacks = _ordered(callbacks)
    _require_own_keys(callbacks)
    return callbacks


def let_log(callbacks: Sequence[object], module: LightningModule) -> None:
    """Give callbacks the module's ``log`` and ``log_dict``, except those that have their own."""
    for callback in callbacks:
        for name in ("log", "log_dict"):
            if not hasattr(type(callback), name) and hasattr(callback, "__dict__"):
                setattr(callback, name, getattr(module, name))


def _default_bar() -> ProgressBar:
    from fulmen.callbacks.progress import RichProgressBar, TQDMProgressBar

    return RichProgressBar() if find_spec("rich") is not None else TQDMProgressBar()


def _default_summary() -> ModelSummary:
    if find_spec("rich") is not None:
        from fulmen.callbacks.rich_model_summary import RichModelSummary

        return RichModelSummary()
    return ModelSummary()


def _ordered(callbacks: list[Any]) -> list[Any]:
    return sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))  # stable: the user's order is kept


def _require_own_keys(callbacks: Sequence[object]) -> None:
    seen: dict[str, object] = {}
    for callback in callbacks:
        key = getattr(callback, "state_key", None)
        if key is None or not _is_stateful(callback):
            continue
        if key in seen:
            raise MisconfigurationException(
                f"two callbacks have the state key {key!r} ({type(seen[key]).__name__} and {type(callback).__name__}), "
                "so a checkpoint could not tell their states apart. "
                "Give them different arguments, or override state_key."
            )
        seen[key] = callback


def _is_stateful(callback: object) -> bool:
    from fulmen.callbacks.callback import Callback

    method = getattr(type(callback), "state_dict", None)
    return method is not None and method is not Callback.state_dict


def attach_to(callbacks: list[Any], own: Sequence[object]) -> None:
    """Let the module's ``configure_callbacks`` replace callbacks of the same or a parent class, in place."""
    if not own:
        return
    kinds = tuple(type(callback) for callback in own)
    kept = [c for c in callbacks if not any(issubclass(kind, type(c)) for kind in kinds) or c in own]
    replaced = [type(c).__name__ for c in callbacks if c not in kept]
    if replaced:
        rank_zero_info(
            f"configure_callbacks: {', '.join(kind.__name__ for kind in kinds)} of the module replace the Trainer's "
            f"{', '.join(replaced)}."
        )
    callbacks[:] = _ordered([*kept, *(c for c in own if c not in kept)])
    _require_own_keys(callbacks)
