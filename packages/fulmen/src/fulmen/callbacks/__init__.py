"""Callbacks: what happens beside training, at named moments of a run."""

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpoint import Checkpoint
from fulmen.callbacks.early_stopping import EarlyStopping
from fulmen.callbacks.lambda_function import LambdaCallback
from fulmen.callbacks.model_checkpoint import ModelCheckpoint

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "LambdaCallback", "ModelCheckpoint"]
