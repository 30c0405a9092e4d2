"""A fit whose job ends early: saved as ``hpc_ckpt_N.ckpt``, queued again, and found in the job's next life."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

from fulmen import _files, _run_log
from fulmen.exceptions import PreemptedException
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsRequeue

if TYPE_CHECKING:
    from signal import Signals

    from fulmen.trainer import Trainer

__all__ = ["may_have_been_requeued", "save_and_requeue", "saved_for_requeue", "say_that_the_user_handles"]

_NAME = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


def saved_for_requeue(folder: str) -> dict[int, str]:
    """Paths of the checkpoints in ``folder`` that were saved before a job was queued again, by their numbers."""
    matches = [_NAME.fullmatch(name) for name in _files.list_folder(folder)]
    return {int(match[1]): _files.join(folder, match[0]) for match in matches if match}


def may_have_been_requeued(trainer: Trainer) -> bool:
    """Whether this process is part of a job that its scheduler can run more than once."""
    environment = trainer.assembly.environment
    return supports(environment, SupportsRequeue) and environment.detect()


def say_that_the_user_handles(number: Signals) -> None:
    """Why no job will be queued again."""
    rank_zero_info(
        f"{number.name} announces the end of this job, but the program has a handler for it already: that one stays, "
        f"and the job is not queued again. Remove it, or choose another signal as requeue_signal."
    )


def save_and_requeue(trainer: Trainer, environment: SupportsRequeue, reason: str) -> NoReturn:
    """Save, end the loggers' runs, and ask the scheduler, in this order: the scheduler may end the job at once.

    Every rank must call it, after the same step.

    Raises:
        PreemptedException: always.
    """
    folder = _files.absolute(trainer.default_root_dir)
    # Ranks of other nodes may have another view of the folder.
    number = max(saved_for_requeue(folder), default=0) + 1 if trainer.is_global_zero else 0
    if trainer.world_size > 1:
        number = trainer.world.collectives.broadcast_object(number)
    path = _files.join(folder, f"hpc_ckpt_{number}.ckpt")
    trainer.save_checkpoint(path)
    rank_zero_info(f"stopped ({reason}) and saved {path}")
    _run_log.end(trainer, "finished")
    if trainer.is_global_zero:
        try:
            environment.requeue()
        except RuntimeError as error:
            rank_zero_warn(f"the job could not be queued again, but it can go on from {path}: {error}")
        else:
            rank_zero_info("the job is queued again")
    raise PreemptedException(reason, path)
