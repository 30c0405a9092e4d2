"""Checkpoint: the marker by which the Trainer knows callbacks that save."""

from __future__ import annotations

from fulmen.callbacks.callback import Callback

__all__ = ["Checkpoint"]


class Checkpoint(Callback):
    """Base of callbacks that write checkpoints.

    The Trainer runs them after all other callbacks and after the module, so that they see every value of the moment
    they save, and it adds no ``ModelCheckpoint`` of its own when one is there.
    """
