"""Loggers by the names people look for here; they live in fulmen-loggers."""

from fulmen_loggers import CSVLogger, TensorBoardLogger

from fulmen._silent import DummyLogger

__all__ = ["CSVLogger", "DummyLogger", "TensorBoardLogger"]
