"""Whether a failing fit is saved: who saves, and whether all ranks fail at the same step, as each helps to write."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from fulmen.exceptions import PreemptedException, SIGTERMException
from fulmen_fabric.voting import group_store

if TYPE_CHECKING:
    from fulmen._stopping import Stopping
    from fulmen.callbacks.model_checkpoint import ModelCheckpoint
    from fulmen.trainer import Trainer

__all__ = ["all_ranks_fail", "saves_when"]

_TIMEOUT = timedelta(seconds=5)
_ALONE = "other ranks have not failed"


def saves_when(exception: BaseException, callback: ModelCheckpoint, trainer: Trainer) -> bool:
    """Whether ``callback`` saves a fit that ends with ``exception``.

    What SIGTERM ends is saved by somebody: by the first checkpoint callback where none saves on exceptions.
    """
    if isinstance(exception, PreemptedException):  # saved already
        return False
    if callback.save_on_exception or not isinstance(exception, SIGTERMException):
        return callback.save_on_exception
    others = trainer.checkpoint_callbacks
    if others[0] is not callback or any(getattr(other, "save_on_exception", False) for other in others):
        return False
    return callback.save_top_k != 0 or bool(callback.save_last)


def all_ranks_fail(trainer: Trainer, name: str, exception: BaseException) -> bool:
    """Wait a few seconds for the other ranks to say that they fail, too; a note on ``exception`` tells if they do not.

    A rank that failed alone must not wait for the others in a collective: they are in another one, and nobody would
    learn of the failure. So ranks meet at the store, each with its step; the first that has seen all, or has waited
    long enough, decides for all.

    Args:
        trainer: whose run fails.
        name: the same on every rank, and new for each failure.
        exception: what happened on this rank.
    """
    ranks = trainer.world_size
    if ranks == 1:
        return True
    store = group_store()
    if store is None:
        return False
    stopping: Stopping = vars(trainer)["_stopping"]
    run = f"{stopping.run_name}/failing/{name}"  # a group may outlive many trainers
    keys = [f"{run}/{rank}" for rank in range(ranks)]
    store.set(keys[trainer.global_rank], str(trainer.global_step))
    found = _ALONE
    if not any(_ALONE in note for note in getattr(exception, "__notes__", ())):  # another callback has waited already
        try:
            store.wait(keys, _TIMEOUT)
        except dist.DistError:
            pass
        else:
            steps = sorted({int(store.get(key)) for key in keys})
            found = "" if len(steps) == 1 else f"ranks have failed at different steps, {steps}"
    # compare_set writes only where nothing is, and gives what is there: the first decision stands.
    found = store.compare_set(f"{run}/decision", "", found or "save").decode()
    if found == "save":
        return True
    exception.add_note(f"fulmen: {name} saved no checkpoint, since {found}: a checkpoint is written by all together.")
    return False
