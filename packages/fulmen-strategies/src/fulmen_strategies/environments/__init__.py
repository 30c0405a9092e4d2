"""Cluster environments: where a process stands, as the one that started it says."""

from fulmen_strategies.environments.local import LightningEnvironment
from fulmen_strategies.environments.slurm import SLURMEnvironment
from fulmen_strategies.environments.torchrun import TorchElasticEnvironment

__all__ = ["LightningEnvironment", "SLURMEnvironment", "TorchElasticEnvironment"]
