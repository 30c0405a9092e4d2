"""Whom ``ModelCheckpoint`` tells what it has saved: loggers that upload files, and people who want a list."""

from __future__ import annotations

import json
import weakref
from functools import partial
from typing import TYPE_CHECKING

from fulmen import _files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fulmen.callbacks.model_checkpoint import ModelCheckpoint
    from fulmen.trainer import Trainer

__all__ = ["tell_loggers", "write_scores"]


def tell_loggers(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Call ``after_save_checkpoint`` of the loggers that have it, on rank 0, once the file is there.

    They must not keep the callback alive.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            after_save = getattr(logger, "after_save_checkpoint", None)
            if after_save is not None:
                trainer.strategy.saving.tell(partial(after_save, weakref.proxy(callback)))


def write_scores(path: str, scores: Mapping[str, Tensor]) -> None:
    """Write the paths of checkpoints with their scores to a YAML file at ``path``, whose folder is made if need be."""
    _files.make_folder(_files.parent(_files.absolute(path)))
    with _files.open_text(path, "w") as stream:
        # A JSON string is a YAML string too.
        lines = [f"{json.dumps(name)}: {score.item()!r}\n" for name, score in scores.items()]
        stream.write("".join(lines) or "{}\n")
