"""What ``ckpt_path`` means: a path or URL, ``"best"``, ``"last"``, ``"hpc"``, what the user has set, or nothing."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from fulmen import _files
from fulmen._requeue import may_have_been_requeued, saved_for_requeue
from fulmen.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from fulmen.states import TrainerFn
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import MisconfigurationException, OwnsCheckpoints, SupportsVerification

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

__all__ = ["find_hpc", "find_last", "resolve_path"]

_REGISTRY = re.compile(r"registry(:.*)?", re.IGNORECASE)


def resolve_path(trainer: Trainer, asked: str | os.PathLike[str] | None, *, model_given: bool) -> str | None:
    """The path that ``ckpt_path`` means in the call that is about to start, or None; found before anything starts.

    A path that the user has set as ``trainer.ckpt_path`` holds for every call that is given none.

    Raises:
        MisconfigurationException: there is no such checkpoint, or it is in a registry.
    """
    trainer.strategy.saving.wait()  # what is about to be looked for may still be on its way
    settled = trainer._users_ckpt_path  # pyright: ignore[reportPrivateUsage]
    if settled is not None and asked is None:
        asked = settled
    elif settled is not None:
        rank_zero_warn(
            f"trainer.ckpt_path is {settled!r}, and this call was given ckpt_path={os.fspath(asked or '')!r}: the "
            "latter is loaded, and trainer.ckpt_path is forgotten."
        )
        trainer._users_ckpt_path = None  # pyright: ignore[reportPrivateUsage]
    if asked is None:
        return _unasked(trainer, model_given=model_given)
    text = os.fspath(asked)
    if text == "best":
        return _best(trainer, "ckpt_path='best'", "Call fit first, or give a path.")
    if text == "last":
        last = find_last(trainer)
        if last is None:
            rank_zero_warn("ckpt_path='last', but no checkpoint was found: nothing is loaded.")
        return last
    if text == "hpc":
        found = find_hpc(trainer)
        if found is None:
            raise MisconfigurationException(
                f"ckpt_path='hpc', but {trainer.default_root_dir!r} holds no hpc_ckpt_N.ckpt. Give a path."
            )
        return found
    if _REGISTRY.fullmatch(text):
        raise MisconfigurationException(
            f"ckpt_path={text!r} names a model in Lightning's registry, which only its own client (litmodels) reads. "
            "Download the checkpoint with it, and give the file's path."
        )
    if not text:
        raise MisconfigurationException("ckpt_path='' names no checkpoint. Give a path, 'best', 'last', or None.")
    return text


def _unasked(trainer: Trainer, *, model_given: bool) -> str | None:
    fn = trainer.state.fn
    if fn is TrainerFn.FITTING:
        return _left_behind(trainer)
    if model_given:
        return None
    fix = "Pass the model to use its weights as they are."
    if not _ranking(trainer):
        rank_zero_info(f"trainer.{fn}() uses the weights as they are: no checkpoint callback knows better ones.")
        return None
    best = _best(trainer, f"trainer.{fn}() without a model uses the best checkpoint", fix)
    rank_zero_warn(f"trainer.{fn}() without a model uses the best checkpoint, {best}. {fix}")
    return best


def _left_behind(trainer: Trainer) -> str | None:
    """What an earlier life of this fit has saved when it ended early: the newer one where there are two."""
    hpc = find_hpc(trainer) if may_have_been_requeued(trainer) else None
    last = None
    if any(isinstance(callback, OnExceptionCheckpoint) for callback in trainer.callbacks):
        last = find_last(trainer)
    if hpc is not None and (last is None or _files.modified(hpc) >= _files.modified(last)):
        rank_zero_info(
            f"this job was saved when it was queued again, so trainer.fit() goes on from {hpc}. To begin anew, pass "
            "another default_root_dir, or delete the hpc_ckpt_N.ckpt in this one."
        )
        return hpc
    if last is not None:
        rank_zero_info(
            f"there is an OnExceptionCheckpoint, so trainer.fit() goes on from the last checkpoint, {last}. "
            "Delete that file to begin anew."
        )
    return last


def _ranking(trainer: Trainer) -> list[Any]:
    return [callback for callback in trainer.checkpoint_callbacks if hasattr(callback, "best_model_path")]


def _best(trainer: Trainer, asked: str, fix: str) -> str:
    if trainer.settings.fast_dev_run:
        raise MisconfigurationException(f"{asked}: fast_dev_run saves no checkpoint. Drop one of the two. {fix}")
    ranking = _ranking(trainer)
    if not ranking:
        raise MisconfigurationException(f"{asked}, but there is no checkpoint callback. Add ModelCheckpoint. {fix}")
    if len(ranking) > 1:
        rank_zero_warn(
            f"{asked}, and {len(ranking)} checkpoint callbacks have one: that of the first is taken "
            f"(monitor={getattr(ranking[0], 'monitor', None)!r}). Give the path to take another."
        )
    best = str(ranking[0].best_model_path)
    if not best:
        raise MisconfigurationException(f"{asked}, but the checkpoint callback has saved nothing yet. {fix}")
    return best


def find_last(trainer: Trainer) -> str | None:
    """The newest whole checkpoint that the checkpoint callbacks call last; says which were passed over as damaged."""
    found: set[str] = set()
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "_find_last_checkpoints"):
            found |= callback._find_last_checkpoints(trainer)
    return _first_whole(trainer, _newest_first(found))


def _first_whole(trainer: Trainer, paths: list[str]) -> str | None:
    """The first that is not damaged; says which were passed over."""
    io = trainer.strategy.checkpoint_io
    engine = trainer.strategy.backend
    for path in paths:
        reader: object = engine if supports(engine, OwnsCheckpoints) and engine.owns_checkpoint(path) else io
        if not supports(reader, SupportsVerification):
            return path
        try:
            reader.verify_checkpoint(path)
        except (OSError, ValueError) as error:
            rank_zero_warn(f"{path} is damaged and is passed over: {error}")
            continue
        return path
    return None


def _newest_first(paths: set[str]) -> list[str]:
    dated: list[tuple[float, str]] = []
    for path in paths:
        try:
            dated.append((_files.modified(path), path))
        except OSError as error:  # a link to a file that is gone
            rank_zero_warn(f"{path} is passed over: {error}")
    return [path for _, path in sorted(dated, reverse=True)]


def find_hpc(trainer: Trainer) -> str | None:
    """Of the checkpoints saved before a job was queued again, the whole one with the greatest number.

    Says which were passed over as damaged.
    """
    found = saved_for_requeue(_files.absolute(trainer.default_root_dir))
    return _first_whole(trainer, [found[number] for number in sorted(found, reverse=True)])
