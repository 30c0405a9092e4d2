"""Strategies, collectives, launchers and cluster environments on torch.distributed."""

from fulmen_strategies.collectives import TorchCollectives
from fulmen_strategies.ddp import DDPStrategy
from fulmen_strategies.environments.kubeflow import KubeflowEnvironment
from fulmen_strategies.environments.local import LightningEnvironment
from fulmen_strategies.environments.lsf import LSFEnvironment
from fulmen_strategies.environments.mpi import MPIEnvironment
from fulmen_strategies.environments.slurm import SLURMEnvironment
from fulmen_strategies.environments.torchrun import TorchElasticEnvironment
from fulmen_strategies.launchers.local import LocalLauncher
from fulmen_strategies.launchers.processes import ProcessLauncher
from fulmen_strategies.single import SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "LocalLauncher",
    "MPIEnvironment",
    "ProcessLauncher",
    "SLURMEnvironment",
    "SingleDeviceStrategy",
    "TorchCollectives",
    "TorchElasticEnvironment",
]
