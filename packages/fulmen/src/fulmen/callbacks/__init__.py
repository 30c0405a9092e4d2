"""Callbacks: what happens beside training, at named moments of a run."""

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpoint import Checkpoint

__all__ = ["Callback", "Checkpoint"]
