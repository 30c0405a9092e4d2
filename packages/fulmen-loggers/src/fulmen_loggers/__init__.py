"""CSV, TensorBoard, Weights & Biases, MLflow and Comet loggers, for fulmen or for your own loop."""

from fulmen_loggers._merge import merge_dicts
from fulmen_loggers.comet import CometLogger
from fulmen_loggers.csv import CSVLogger
from fulmen_loggers.mlflow import MLFlowLogger
from fulmen_loggers.tensorboard import TensorBoardLogger
from fulmen_loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "CometLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger", "merge_dicts"]
