"""CSV and TensorBoard loggers for fulmen or for your own loop."""

from fulmen_loggers.csv import CSVLogger
from fulmen_loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "TensorBoardLogger"]
