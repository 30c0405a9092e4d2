"""Saving and restoring a run: the content is Lightning's, plus what an exact resume needs, under ``fulmen``."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from fulmen._canonical import as_named_here, canonical
from fulmen._checkpoint_layout import LIGHTNING_VERSION, lightning_loops, progress_from_lightning
from fulmen._checkpoint_path import resolve_path
from fulmen.hparams import checkpoint_entries
from fulmen.states import TrainerStatus
from fulmen_fabric import collect_rng_state, rank_zero_info, rank_zero_warn, restore_rng_state
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    CheckpointError,
    MisconfigurationException,
    SupportsGradScaling,
    SupportsShardedState,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen._metering import Metering
    from fulmen._session import Session
    from fulmen.trainer import Trainer

__all__ = [
    "dump",
    "load",
    "resolve_path",
    "restore_modules_and_callbacks",
    "restore_position",
    "restore_rng",
    "restore_training",
    "save",
]

_VERSION = 1


def save(
    trainer: Trainer,
    session: Session,
    path: str,
    weights_only: bool,
    storage_options: Mapping[str, object] | None,
) -> None:
    """Every rank builds the checkpoint, rank 0 writes it, and all wait until it is there or, asynchronously, taken."""
    checkpoint = dump(trainer, session, weights_only=weights_only)
    trainer.strategy.save_checkpoint(checkpoint, path, storage_options)
    trainer.strategy.barrier("save_checkpoint")
    if trainer.state.status is not TrainerStatus.RUNNING:  # no step follows that could go on meanwhile
        trainer.strategy.saving.finish()


def dump(trainer: Trainer, session: Session, *, weights_only: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of this moment. Every rank must call it."""
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    module, strategy = session.module, trainer.assembly.strategy
    placed = session.placed if session.placed is not None else module
    sharded = strategy if supports(strategy, SupportsShardedState) else None
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": canonical(
            module.state_dict() if sharded is None else dict(sharded.module_state(placed, full=True))
        ),
        "loops": lightning_loops(progress, trainer.accumulate_grad_batches),
    }
    if not weights_only:
        checkpoint["callbacks"] = callbacks = {}
        for callback in trainer.callbacks:
            state = session.within("state_dict", callback.state_dict)() if hasattr(callback, "state_dict") else None
            if state:
                callbacks[_state_key(callback)] = state
        checkpoint["optimizer_states"] = [
            optimizer.state_dict() if sharded is None else dict(sharded.optimizer_state(placed, optimizer, full=True))
            for optimizer in session.optimizers
        ]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in session.schedulers]
        precision = trainer.assembly.precision
        if supports(precision, SupportsGradScaling):
            checkpoint["MixedPrecision"] = precision.state_dict()
        checkpoint["fulmen"] = _exact_state(trainer, session)
    checkpoint.update(checkpoint_entries(module))
    if session.datamodule is not None:
        checkpoint.update(checkpoint_entries(session.datamodule, prefix="datamodule_"))
        state = session.scoped("state_dict", session.datamodule.state_dict, session.datamodule)()
        if state:
            checkpoint[type(session.datamodule).__qualname__] = state
    if not weights_only:
        for callback in trainer.callbacks:
            hook = getattr(callback, "on_save_checkpoint", None)
            if hook is not None:
                session.scoped("on_save_checkpoint", hook, callback)(trainer, module, checkpoint)
    else:
        for callback in trainer.callbacks:
            # Averaged or pruned weights are what the model is, also in a file that holds nothing else.
            clean = getattr(callback, "weights_to_save", None)
            if clean is not None:
                checkpoint["state_dict"] = clean(trainer, module, checkpoint["state_dict"])
    session.scoped("on_save_checkpoint", module.on_save_checkpoint)(checkpoint)
    return checkpoint


def _exact_state(trainer: Trainer, session: Session) -> dict[str, Any]:
    """Counters, and each rank's random state, data position and running metrics."""
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    store = trainer._metering.train if trainer._fitting else None  # pyright: ignore[reportPrivateUsage]
    loader = session.train_loader
    within_epoch = progress.epoch_started and not progress.epoch_ended
    mine = {
        "rng": collect_rng_state(trainer.world.device),
        "loader": None if loader is None else loader.state_dict(progress.batch, within_epoch=within_epoch),
        "metrics": None if store is None else store.state_dict(),
    }
    return {
        "version": _VERSION,
        "progress": progress.state_dict(),
        "ranks": trainer.world.collectives.all_gather_object(mine),
        "callback_metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
    }


def _state_key(callback: Any) -> str:
    return str(getattr(callback, "state_key", type(callback).__qualname__))


def load(trainer: Trainer, path: str, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint to the CPU, and say so."""
    rank_zero_info(f"restoring from {path}")
    return trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)


def restore_modules_and_callbacks(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    """Weights, datamodule and callbacks: what every call restores.

    Raises:
        RuntimeError: the weights do not fit the module and its loading is strict.
    """
    module = session.module
    session.scoped("on_load_checkpoint", module.on_load_checkpoint)(checkpoint)
    strict = module.strict_loading
    outcome = module.load_state_dict(as_named_here(checkpoint["state_dict"], module), strict=strict)
    missing = cast("list[str]", outcome.missing_keys)
    unexpected = cast("list[str]", outcome.unexpected_keys)
    if not strict and (missing or unexpected):
        rank_zero_warn(
            f"loaded with strict_loading=False: {len(missing)} keys are missing from the checkpoint ({missing[:5]}), "
            f"{len(unexpected)} are not in the module ({unexpected[:5]})."
        )
    if session.datamodule is not None:
        state = checkpoint.get(type(session.datamodule).__qualname__)
        if state:
            session.scoped("load_state_dict", session.datamodule.load_state_dict, session.datamodule)(state)
    for callback in trainer.callbacks:
        hook = getattr(callback, "on_load_checkpoint", None)
        if hook is not None:
            session.scoped("on_load_checkpoint", hook, callback)(trainer, module, checkpoint)
    states: dict[object, Any] = checkpoint.get("callbacks") or {}
    # Before Lightning 1.5 the key was the class itself; it comes back only from a file that may run code.
    keys: list[tuple[Any, object, object]] = [(c, _state_key(c), cast("object", type(c))) for c in trainer.callbacks]
    known = {key for _, *names in keys for key in names}
    unknown = [key for key in states if key not in known]
    if unknown and trainer._fitting:  # pyright: ignore[reportPrivateUsage]
        rank_zero_warn(f"the checkpoint holds the state of callbacks that this Trainer does not have: {unknown}.")
    for callback, key, legacy_key in keys:
        state = states.get(key, states.get(legacy_key))
        if state is not None and hasattr(callback, "load_state_dict"):
            session.within("load_state_dict", callback.load_state_dict)(copy.deepcopy(state))


def restore_training(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    """Scaler, counters, optimizers and schedulers: what only a fit restores.

    Raises:
        CheckpointError: it holds weights only.
        MisconfigurationException: it has already run longer than this Trainer would.
    """
    precision = trainer.assembly.precision
    scaler_state = checkpoint.get("MixedPrecision", checkpoint.get("native_amp_scaling_state"))
    if scaler_state and supports(precision, SupportsGradScaling):
        precision.load_state_dict(scaler_state)
    if not trainer._fitting:  # pyright: ignore[reportPrivateUsage]
        return
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"{trainer.ckpt_path} holds weights only (it was saved with save_weights_only=True), so training cannot "
            "resume from it. Load the weights with load_from_checkpoint and start anew."
        )
    exact = checkpoint.get("fulmen")
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    if exact is None:
        progress_from_lightning(checkpoint, progress)
    else:
        if exact["version"] != _VERSION:
            raise CheckpointError(
                f"{trainer.ckpt_path} was written with layout {exact['version']}; this fulmen reads {_VERSION}. "
                "Update fulmen."
            )
        progress.load_state_dict(exact["progress"])
    if trainer.max_epochs != -1 and progress.epoch > trainer.max_epochs:
        raise MisconfigurationException(
            f"max_epochs={trainer.max_epochs}, but {trainer.ckpt_path} has already trained {progress.epoch} epochs. "
            "Give a larger max_epochs."
        )
    strategy = trainer.assembly.strategy
    states = checkpoint["optimizer_states"]
    if len(states) != len(session.optimizers):
        raise CheckpointError(
            f"{trainer.ckpt_path} holds the state of {len(states)} optimizers, but configure_optimizers returned "
            f"{len(session.optimizers)}. Return the same ones to resume."
        )
    for optimizer, state in zip(session.optimizers, states, strict=True):
        if supports(strategy, SupportsShardedState):
            assert session.placed is not None
            strategy.load_optimizer_state(session.placed, optimizer, state)
        else:
            optimizer.load_state_dict(state)
    for config, state in zip(session.schedulers, checkpoint.get("lr_schedulers", ()), strict=False):
        config.scheduler.load_state_dict(state)
    session.resumed = exact


def _mine(session: Session) -> dict[str, Any] | None:
    exact = session.resumed
    if exact is None:
        return None
    ranks = exact["ranks"]
    return ranks[session.world.rank] if len(ranks) == session.world.world_size else None


def restore_position(session: Session, metering: Metering) -> None:
    """Data position and running metrics, before the first batch."""
    if session.resumed is not None:
        metering.reporter.restore(session.resumed["callback_metrics"], session.world.device)
    mine = _mine(session)
    if mine is None:
        if session.resumed is not None:
            rank_zero_warn(
                f"this run was saved by {len(session.resumed['ranks'])} processes and goes on with "
                f"{session.world.world_size}: random states are not restored."
            )
        return
    assert session.train_loader is not None
    if mine["loader"] is not None:
        session.train_loader.load_state_dict(mine["loader"])
    if mine["metrics"] is not None:
        metering.train.load_state_dict(mine["metrics"], module=session.module)


def restore_rng(session: Session) -> None:
    """Random states, last of all: nothing may draw between this and the first batch."""
    mine = _mine(session)
    session.resumed = None
    if mine is not None:
        restore_rng_state(mine["rng"], session.world.device)
