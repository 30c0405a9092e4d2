"""Whom ``ModelCheckpoint`` tells what it has saved: loggers that upload files, and people who want a list."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from fulmen import _files
from fulmen._run_log import checkpoint_saved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fulmen.callbacks.model_checkpoint import ModelCheckpoint
    from fulmen.trainer import Trainer

__all__ = ["tell_loggers", "write_scores"]


def tell_loggers(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Note in the run's log what was saved, and tell the loggers that take checkpoints, once the file is there.

    On rank 0. They must not keep the callback alive.
    """
    if trainer.is_global_zero:
        trainer.strategy.saving.tell(partial(checkpoint_saved, trainer, callback))


def write_scores(path: str, scores: Mapping[str, Tensor]) -> None:
    """Write the paths of checkpoints with their scores to a YAML file at ``path``, whose folder is made if need be."""
    _files.make_folder(_files.parent(_files.absolute(path)))
    with _files.open_text(path, "w") as stream:
        # A JSON string is a YAML string too.
        lines = [f"{json.dumps(name)}: {score.item()!r}\n" for name, score in scores.items()]
        stream.write("".join(lines) or "{}\n")
