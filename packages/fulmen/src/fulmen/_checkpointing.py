"""Saving and restoring a run: the content is Lightning's, plus what an exact resume needs, under ``fulmen``."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from fulmen._checkpoint_layout import LIGHTNING_VERSION, lightning_loops, progress_from_lightning
from fulmen._checkpoint_path import resolve_path
from fulmen._exact_state import (
    exact_state,
    foreign_state,
    loader_states,
    require_known_version,
)
from fulmen._partial_resume import EVERYTHING, change, mention, options, tell
from fulmen._reporting import reporter_of
from fulmen._storable import storable_entries
from fulmen._window_gradients import restore_gradients
from fulmen.states import TrainerStatus
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_fabric.compiled import as_named_here, canonical
from fulmen_protocols import (
    CheckpointError,
    MisconfigurationException,
    OwnsBackward,
    OwnsCheckpoints,
    SupportsGradScaling,
    SupportsShardedSave,
    SupportsShardedState,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from fulmen._session import Session
    from fulmen.trainer import Trainer

__all__ = [
    "dump",
    "is_full",
    "is_sharded",
    "load",
    "load_module_state",
    "load_optimizer_state",
    "module_state",
    "optimizer_state",
    "resolve_path",
    "restore_modules_and_callbacks",
    "restore_training",
    "save",
]


def save(
    trainer: Trainer,
    session: Session,
    path: str,
    weights_only: bool,
    storage_options: Mapping[str, object] | None,
) -> None:
    """Every rank builds the checkpoint, rank 0 writes it, and all wait until it is there or, asynchronously, taken."""
    reporter_of(trainer).settle()  # what a resumed run will not log again is in the log
    checkpoint = dump(trainer, session, weights_only=weights_only)
    trainer.strategy.save_checkpoint(checkpoint, path, storage_options)
    trainer.strategy.barrier("save_checkpoint")
    if trainer.state.status is not TrainerStatus.RUNNING:  # no step follows that could go on meanwhile
        trainer.strategy.saving.finish()


def module_state(session: Session, *, full: bool) -> Mapping[str, Any]:
    """The weights as a checkpoint holds them, by their plain names. Every rank must call it.

    ``full``: sharded ones are gathered on rank 0.
    """
    strategy, module = session.assembly.strategy, session.module
    if not supports(strategy, SupportsShardedState):
        return canonical(module.state_dict())  # as it is: torch keeps the layers' versions in an attribute of it
    placed = module if session.placed is None else session.placed
    return canonical(dict(strategy.module_state(placed, full=full)))


def optimizer_state(session: Session, optimizer: Optimizer, *, full: bool) -> dict[str, Any]:
    """The state of one of the session's optimizers as a checkpoint holds it; see ``module_state``."""
    strategy = session.assembly.strategy
    if not supports(strategy, SupportsShardedState):
        return optimizer.state_dict()
    placed = session.module if session.placed is None else session.placed
    return dict(strategy.optimizer_state(placed, optimizer, full=full))


def load_module_state(
    session: Session, state: Mapping[str, Any], *, strict: bool
) -> tuple[Sequence[str], Sequence[str]]:
    """Load what ``module_state`` gave, of either kind. Every rank must call it.

    Returns:
        The names that are missing, and those that the module has not.

    Raises:
        RuntimeError: it does not fit the module.
    """
    strategy, module = session.assembly.strategy, session.module
    state = as_named_here(state, module)
    if not supports(strategy, SupportsShardedState):
        outcome = module.load_state_dict(state, strict=strict)
        return cast("list[str]", outcome.missing_keys), cast("list[str]", outcome.unexpected_keys)
    assert session.placed is not None
    own = module.state_dict().keys()
    strategy.load_module_state(session.placed, state, strict=strict)
    return [name for name in own if name not in state], [name for name in state if name not in own]


def load_optimizer_state(session: Session, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` gave, of either kind, into one of the session's optimizers."""
    strategy = session.assembly.strategy
    if supports(strategy, SupportsShardedState):
        assert session.placed is not None
        strategy.load_optimizer_state(session.placed, optimizer, state)
    else:
        optimizer.load_state_dict(state)


def is_full(session: Session) -> bool:
    """Whether checkpoints of this run hold whole tensors."""
    # Shards stay where they are if that is wanted, and if there is a format that every rank writes.
    strategy, checkpoint_io = session.assembly.strategy, session.assembly.checkpoint_io
    wanted = supports(strategy, SupportsShardedState) and strategy.state_kind == "sharded"
    return not (wanted and supports(checkpoint_io, SupportsShardedSave))


def dump(trainer: Trainer, session: Session, *, weights_only: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of this moment. Every rank must call it."""
    for callback in trainer.callbacks:
        # Before anything is collected: it may still change the weights.
        prepare = getattr(callback, "before_checkpoint", None)
        if prepare is not None:
            prepare(trainer, session.module)
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    module, strategy, full = session.module, session.assembly.strategy, is_full(session)
    # An engine writes module and optimizers itself: hooks are shown what this rank holds.
    by_engine = not weights_only and supports(strategy, OwnsCheckpoints)
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": dict(canonical(module.state_dict())) if by_engine else module_state(session, full=full),
        "loops": lightning_loops(
            progress,
            loader_states(session, progress),
            automatic=module.automatic_optimization,
            validating=trainer.validating,
        ),
    }
    if not weights_only:
        checkpoint["callbacks"] = callbacks = {}
        for callback in trainer.callbacks:
            state = session.within("state_dict", callback.state_dict)() if hasattr(callback, "state_dict") else None
            if state:
                callbacks[_state_key(callback)] = state
        checkpoint["optimizer_states"] = (
            [] if by_engine else [optimizer_state(session, optimizer, full=full) for optimizer in session.optimizers]
        )
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in session.schedulers]
        precision = trainer.assembly.precision
        if supports(precision, SupportsGradScaling) and not supports(strategy, OwnsBackward):
            checkpoint["MixedPrecision"] = precision.state_dict()
        checkpoint["fulmen"] = exact_state(trainer, session, full=full)
    checkpoint.update(storable_entries(module, trainer.strategy.checkpoint_io))
    if session.datamodule is not None:
        checkpoint.update(storable_entries(session.datamodule, trainer.strategy.checkpoint_io, "datamodule_"))
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


def _state_key(callback: Any) -> str:
    return str(getattr(callback, "state_key", type(callback).__qualname__))


def load(trainer: Trainer, session: Session, path: str, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint to the CPU, and say so; of one that an engine wrote, what is no module and no optimizer."""
    rank_zero_info(f"restoring from {path}")
    strategy = session.assembly.strategy
    if supports(strategy, OwnsCheckpoints) and strategy.owns_checkpoint(path):
        session.engine_checkpoint, session.engine_weights_only = path, weights_only
        return strategy.read_rest(path, weights_only)
    return trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)


def is_sharded(session: Session) -> bool:
    """Whether weights are loaded into a module that has been placed, each rank taking its part."""
    return supports(session.assembly.strategy, SupportsShardedState)


def restore_modules_and_callbacks(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    """Weights, datamodule and callbacks: what every call restores.

    Raises:
        RuntimeError: the weights do not fit the module and its loading is strict.
    """
    module = session.module
    session.scoped("on_load_checkpoint", module.on_load_checkpoint)(checkpoint)
    if session.resume.takes("weights"):
        if session.engine_checkpoint is None:
            _restore_weights(trainer, session, checkpoint)
        elif not trainer._fitting:  # pyright: ignore[reportPrivateUsage]
            _restore_by_engine(session, optimizers=False)
    if session.datamodule is not None and session.resume.takes("data"):
        state = checkpoint.get(type(session.datamodule).__qualname__)
        if state:
            session.scoped("load_state_dict", session.datamodule.load_state_dict, session.datamodule)(state)
    if session.resume.takes("callbacks"):
        _restore_callbacks(trainer, session, checkpoint)


def _restore_weights(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    module = session.module
    strict = module.strict_loading
    try:
        outcome = load_module_state(session, checkpoint["state_dict"], strict=strict)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of {trainer.ckpt_path!r} do not fit {type(module).__name__}: {error}\nGive the checkpoint of "
            "this model, or set strict_loading=False on it to load what fits by name."
        ) from error
    missing, unexpected = outcome
    if not strict and (missing or unexpected):
        rank_zero_warn(
            f"loaded with strict_loading=False: {len(missing)} keys are missing from the checkpoint ({missing[:5]}), "
            f"{len(unexpected)} are not in the module ({unexpected[:5]})."
        )


def _restore_callbacks(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    for callback in trainer.callbacks:
        hook = getattr(callback, "on_load_checkpoint", None)
        if hook is not None:
            session.scoped("on_load_checkpoint", hook, callback)(trainer, session.module, checkpoint)
    states: dict[object, Any] = checkpoint.get("callbacks") or {}
    # Before Lightning 1.5 the key was the class itself: it comes back as its name, or from a file that may run code.
    keys: list[tuple[Any, tuple[object, ...]]] = [
        (callback, (_state_key(callback), type(callback), type(callback).__qualname__))
        for callback in trainer.callbacks
    ]
    known = {key for _, names in keys for key in names}
    unknown = [key for key in states if key not in known]
    if unknown and trainer._fitting:  # pyright: ignore[reportPrivateUsage]
        rank_zero_warn(f"the checkpoint holds the state of callbacks that this Trainer does not have: {unknown}.")
    for callback, names in keys:
        state = next((states[key] for key in names if key in states), None)
        if state is not None and hasattr(callback, "load_state_dict"):
            session.within("load_state_dict", callback.load_state_dict)(copy.deepcopy(state))


def restore_training(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    """Scaler, counters, optimizers and schedulers: what only a fit restores.

    Raises:
        CheckpointError: it holds weights only.
        MisconfigurationException: it has already run longer than this Trainer would.
    """
    resume, precision = session.resume, trainer.assembly.precision
    scaler_state = checkpoint.get("MixedPrecision", checkpoint.get("native_amp_scaling_state"))
    if scaler_state and resume.takes("precision") and supports(precision, SupportsGradScaling):
        precision.load_state_dict(scaler_state)
    if not trainer._fitting:  # pyright: ignore[reportPrivateUsage]
        return
    code = options(session.optimizers)
    if session.engine_checkpoint is not None:
        _restore_fit_by_engine(session)
    if resume.takes("progress"):
        _restore_progress(trainer, session, checkpoint)
    if resume.takes("optimizers") and session.engine_checkpoint is None:
        _restore_optimizers(trainer, session, checkpoint)
    states = checkpoint.get("lr_schedulers", ()) if resume.takes("schedulers") else ()
    for config, state in zip(session.schedulers, states, strict=False):
        config.scheduler.load_state_dict(state)
    if resume.takes("progress"):
        restore_gradients(session)
    file = options(session.optimizers)
    if resume is EVERYTHING:
        mention(trainer.ckpt_path, code, file, scheduled=bool(states and session.schedulers))
    else:
        change(resume, session.optimizers, scheduled=bool(states and session.schedulers))
        tell(resume, trainer.ckpt_path, code, file, options(session.optimizers))


def _restore_fit_by_engine(session: Session) -> None:
    """Module and optimizers, once the engine is there to load them."""
    resume = session.resume
    weights, optimizers = resume.takes("weights"), resume.takes("optimizers")
    if optimizers and not weights:
        raise MisconfigurationException(
            f"Resume asks for the optimizers of {session.engine_checkpoint!r} without its weights, and the strategy's "
            "engine loads the two together. Take the weights too."
        )
    if weights:
        _restore_by_engine(session, optimizers=optimizers)


def _restore_by_engine(session: Session, *, optimizers: bool) -> None:
    strategy, placed = session.assembly.strategy, session.placed
    assert supports(strategy, OwnsCheckpoints)
    assert placed is not None
    assert session.engine_checkpoint is not None
    try:
        strategy.load_checkpoint(
            placed,
            session.engine_checkpoint,
            optimizers=optimizers,
            strict=session.module.strict_loading,
            weights_only=session.engine_weights_only,
        )
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the weights of {session.engine_checkpoint!r} do not fit {type(session.module).__name__}: {error}\n"
            "Give the checkpoint of this model, or set strict_loading=False on it to load what fits by name."
        ) from error


def _restore_progress(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    _require_training_state(trainer, session, checkpoint)
    exact = checkpoint.get("fulmen")
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    if exact is None:
        progress_from_lightning(checkpoint, progress)
    else:
        require_known_version(exact, trainer.ckpt_path)
        progress.load_state_dict(exact["progress"])
        may_step = trainer.max_steps == -1 or progress.updates < trainer.max_steps
        if may_step and progress.go_back_into_cut_epoch():
            rank_zero_info(f"epoch {progress.epoch} was left after {progress.batch} batches: it goes on there")
    if trainer.max_epochs != -1 and progress.epoch > trainer.max_epochs:
        raise MisconfigurationException(
            f"max_epochs={trainer.max_epochs}, but {trainer.ckpt_path} has already trained {progress.epoch} epochs. "
            "Give a larger max_epochs."
        )
    session.resumed = foreign_state(checkpoint) if exact is None else exact


def _require_training_state(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    by_engine = supports(session.assembly.strategy, OwnsCheckpoints) and "loops" in checkpoint
    if not by_engine and "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"{trainer.ckpt_path} holds weights only (it was saved with save_weights_only=True), so training cannot "
            "resume from it. Load the weights with load_from_checkpoint and start anew."
        )


def _restore_optimizers(trainer: Trainer, session: Session, checkpoint: dict[str, Any]) -> None:
    _require_training_state(trainer, session, checkpoint)
    strategy = trainer.assembly.strategy
    if supports(strategy, OwnsCheckpoints):
        rank_zero_warn(
            f"{trainer.ckpt_path} is one file: the weights are loaded from it, and the optimizers begin anew. To go on "
            "with theirs, give the folder that the strategy's engine saved."
        )
        return
    states = checkpoint["optimizer_states"]
    if len(states) != len(session.optimizers):
        raise CheckpointError(
            f"{trainer.ckpt_path} holds the state of {len(states)} optimizers, but configure_optimizers returned "
            f"{len(session.optimizers)}. Return the same ones to resume."
        )
    for optimizer, state in zip(session.optimizers, states, strict=True):
        load_optimizer_state(session, optimizer, state)
