"""Loggers by the names people look for here; they live in fulmen-loggers."""

from fulmen._silent import DummyLogger
from fulmen_loggers import CSVLogger, TensorBoardLogger

__all__ = ["CSVLogger", "DummyLogger", "TensorBoardLogger"]
