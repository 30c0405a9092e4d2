"""Strategies, collectives, launchers and cluster environments on torch.distributed."""

from fulmen_strategies.collectives import TorchCollectives
from fulmen_strategies.ddp import DDPStrategy
from fulmen_strategies.dp import DataParallelStrategy
from fulmen_strategies.environments.local import LightningEnvironment
from fulmen_strategies.environments.slurm import SLURMEnvironment
from fulmen_strategies.environments.torchrun import TorchElasticEnvironment
from fulmen_strategies.launchers.local import LocalLauncher
from fulmen_strategies.single import SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "DataParallelStrategy",
    "LightningEnvironment",
    "LocalLauncher",
    "SLURMEnvironment",
    "SingleDeviceStrategy",
    "TorchCollectives",
    "TorchElasticEnvironment",
]
