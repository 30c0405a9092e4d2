"""Checkpoints of old Lightning versions in today's layout: keys that were renamed, moved or dropped up to 2.0.

Source of the changes: the upgrade guide and the release notes of Lightning 0.10.0, 1.6.0, 1.6.5, 1.9.0 and 2.0.0.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, Final, cast

from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NEWEST_LAYOUT", "VERSION_KEY", "migrate"]

VERSION_KEY: Final = "pytorch-lightning_version"
LEGACY_KEY: Final = "legacy_pytorch-lightning_version"
NEWEST_LAYOUT: Final = "2.6.0"
"""The version of Lightning whose layout migrated checkpoints have."""

Checkpoint = dict[str, Any]
_BEFORE_0_10: Final = (
    ("checkpoint_callback_best_model_score", "ModelCheckpoint", "best_model_score"),
    ("checkpoint_callback_best_model_path", "ModelCheckpoint", "best_model_path"),
    ("checkpoint_callback_best", "ModelCheckpoint", "best_model_score"),
    ("early_stop_callback_wait", "EarlyStopping", "wait_count"),
    ("early_stop_callback_patience", "EarlyStopping", "patience"),
)


def migrate(checkpoint: dict[str, object], path: str = "") -> list[str]:
    """Bring a checkpoint of an old Lightning, in place, to the layout of Lightning 2.6.

    Anything else, also what a newer version wrote, is left as it is; of the latter a warning tells.

    Returns:
        The versions whose changes were applied, oldest first.

    Raises:
        CheckpointError: it says that it is of an old version, and does not look so.
    """
    if "state_dict" not in checkpoint or "fulmen" in checkpoint:
        return []
    told = checkpoint.get(VERSION_KEY)
    if told is None and not any(old in checkpoint for old, *_ in _BEFORE_0_10):  # a version has been written since 1.0
        return []
    version = "0.0.0" if told is None else str(told)
    if _ordered(version)[:2] > _ordered(NEWEST_LAYOUT)[:2]:
        warnings.warn(
            f"{path or 'the checkpoint'!r} was written by Lightning {version}; the newest layout known here is that of "
            f"{NEWEST_LAYOUT}. It is read as it is; what changed since may be missing.",
            stacklevel=3,
        )
        return []
    applied: list[str] = []
    try:
        for change, steps in _CHANGES.items():
            if _ordered(version) < _ordered(change):
                for step in steps:
                    step(cast("Checkpoint", checkpoint))
                applied.append(change)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path or 'the checkpoint'!r} says that Lightning {version} wrote it, but its layout is another one: "
            f"{type(error).__name__}: {error}. Load it with the version that wrote it."
        ) from error
    if applied:
        checkpoint.setdefault(LEGACY_KEY, version)
        checkpoint[VERSION_KEY] = NEWEST_LAYOUT
    return applied


def _ordered(version: str) -> tuple[int, ...]:
    """Sortable; a release candidate comes before its release."""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:3]]
    early = bool(re.match(r"\d+(\.\d+)*[-.]?(a|b|rc|dev)", version))
    return (*numbers, *[0] * (3 - len(numbers)), -1 if early else 0)


def _callbacks_have_their_own_state(checkpoint: Checkpoint) -> None:
    callbacks: Checkpoint = checkpoint.get("callbacks") or {}
    checkpoint["callbacks"] = callbacks
    for old, owner, new in _BEFORE_0_10:
        if old in checkpoint:
            callbacks.setdefault(owner, {})[new] = checkpoint.pop(old)


def _counters_live_in_the_loops(checkpoint: Checkpoint) -> None:
    if not {"epoch", "global_step"} <= checkpoint.keys():  # weights alone
        return
    loops = checkpoint.setdefault("loops", {})
    step, epoch = checkpoint["global_step"], checkpoint["epoch"]
    if "fit_loop" not in loops:
        loops["fit_loop"] = _fit_loop_of_1_6()
        # Files without loops were written when an epoch had ended: all its counters agree.
        loops["fit_loop"]["epoch_progress"] = {
            scope: dict.fromkeys(("ready", "started", "processed", "completed"), epoch)
            for scope in ("total", "current")
        }
    fit = loops["fit_loop"]
    optimizers = fit["epoch_loop.batch_loop.optimizer_loop.optim_progress"]["optimizer"]
    optimizers["step"]["total"]["completed"] = step
    fit["epoch_loop.batch_loop.manual_loop.optim_step_progress"]["total"]["completed"] = step
    fit["epoch_progress"]["current"]["completed"] = epoch


def _fit_loop_of_1_6() -> Checkpoint:
    def counted(*names: str) -> Checkpoint:
        return {scope: dict.fromkeys(names, 0) for scope in ("total", "current")}

    short, middle = ("ready", "completed"), ("ready", "started", "completed")
    full = ("ready", "started", "processed", "completed")
    return {
        "state_dict": {},
        "epoch_loop.state_dict": {},
        "epoch_loop.batch_progress": {**counted(*full), "is_last_batch": False},
        "epoch_loop.scheduler_progress": counted(*short),
        "epoch_loop.batch_loop.state_dict": {},
        "epoch_loop.batch_loop.manual_loop.state_dict": {},
        "epoch_loop.batch_loop.manual_loop.optim_step_progress": counted(*short),
        "epoch_loop.batch_loop.optimizer_loop.state_dict": {},
        "epoch_loop.batch_loop.optimizer_loop.optim_progress": {
            "optimizer": {"step": counted(*short), "zero_grad": counted(*middle)},
            "optimizer_position": 0,
        },
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.dataloader_progress": counted(*short),
        "epoch_loop.val_loop.epoch_loop.state_dict": {},
        "epoch_loop.val_loop.epoch_loop.batch_progress": {**counted(*full), "is_last_batch": False},
        "epoch_progress": counted(*full),
    }


def _batches_that_stepped_are_counted(checkpoint: Checkpoint) -> None:
    fit = checkpoint.get("loops", {}).get("fit_loop", {})
    if fit:
        fit.setdefault("epoch_loop.state_dict", {}).setdefault("_batches_that_stepped", checkpoint["global_step"])


def _model_checkpoint_key_is_shorter(checkpoint: Checkpoint) -> None:
    old: dict[object, Any] = checkpoint.get("callbacks") or {}
    new: dict[object, Any] = {}
    for key, state in old.items():
        name = key
        if isinstance(key, str) and key.startswith("ModelCheckpoint"):
            name = re.sub(r", 'save_on_train_epoch_end': (None|True|False)", "", key)
        if name in new:
            warnings.warn(
                f"two ModelCheckpoint states of this checkpoint have the key {name!r} since Lightning 1.9: they are "
                "left as they are, and at most one of the callbacks gets its state back.",
                stacklevel=4,
            )
            return
        new[name] = state
    if old:
        checkpoint["callbacks"] = new


def _apex_is_gone(checkpoint: Checkpoint) -> None:
    if checkpoint.pop("amp_scaling_state", None) is not None:
        warnings.warn(
            "this checkpoint holds the state of NVIDIA apex's scaler, which nothing uses since Lightning 2.0: it is "
            "dropped. Train on with precision='16-mixed', which begins with a scale of its own.",
            stacklevel=4,
        )


def _loops_are_flat(checkpoint: Checkpoint) -> None:
    loops: Checkpoint = checkpoint.get("loops") or {}
    fit = loops.get("fit_loop")
    if fit is not None:
        own = fit.pop("epoch_loop.batch_loop.state_dict", None)
        if own:  # of a loop class of the user's: kept where the user can find it
            fit.setdefault("epoch_loop.state_dict", {})["old_batch_loop_state_dict"] = own
        for old, new in (("optimizer_loop", "automatic_optimization"), ("manual_loop", "manual_optimization")):
            for part in ("state_dict", "optim_progress", "optim_step_progress"):
                for before in (f"epoch_loop.batch_loop.{old}.{part}", f"epoch_loop.{old}.{part}"):
                    if before in fit:
                        fit[f"epoch_loop.{new}.{part}"] = fit.pop(before)
        fit.get("epoch_loop.automatic_optimization.optim_progress", {}).pop("optimizer_position", None)
    for name in ("validate_loop", "test_loop", "predict_loop"):
        if name in loops:
            loops[name] = {
                key.removeprefix("epoch_loop."): state
                for key, state in loops[name].items()
                if key != "dataloader_progress" and not (key == "state_dict" and "epoch_loop.state_dict" in loops[name])
            }


_CHANGES: Final[dict[str, tuple[Callable[[Checkpoint], None], ...]]] = {
    "0.10.0": (_callbacks_have_their_own_state,),
    "1.6.0": (_counters_live_in_the_loops,),
    "1.6.5": (_batches_that_stepped_are_counted,),
    "1.9.0": (_model_checkpoint_key_is_shorter,),
    "2.0.0": (_apex_is_gone, _loops_are_flat),
}
