"""Cluster environments: where a process stands, as the one that started it says."""

from fulmen_strategies.environments.kubeflow import KubeflowEnvironment
from fulmen_strategies.environments.local import LightningEnvironment
from fulmen_strategies.environments.lsf import LSFEnvironment
from fulmen_strategies.environments.mpi import MPIEnvironment
from fulmen_strategies.environments.slurm import SLURMEnvironment
from fulmen_strategies.environments.torchrun import TorchElasticEnvironment

__all__ = [
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]
