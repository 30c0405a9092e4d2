"""Strategies, collectives, launchers and cluster environments on torch.distributed.

Each name is imported when it is first used: torch's own modules for sharding take seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen_strategies.collectives import TorchCollectives as TorchCollectives
    from fulmen_strategies.ddp import DDPStrategy as DDPStrategy
    from fulmen_strategies.dp import DataParallelStrategy as DataParallelStrategy
    from fulmen_strategies.environments.kubeflow import KubeflowEnvironment as KubeflowEnvironment
    from fulmen_strategies.environments.local import LightningEnvironment as LightningEnvironment
    from fulmen_strategies.environments.lsf import LSFEnvironment as LSFEnvironment
    from fulmen_strategies.environments.mpi import MPIEnvironment as MPIEnvironment
    from fulmen_strategies.environments.slurm import SLURMEnvironment as SLURMEnvironment
    from fulmen_strategies.environments.torchrun import TorchElasticEnvironment as TorchElasticEnvironment
    from fulmen_strategies.fsdp import FSDPStrategy as FSDPStrategy
    from fulmen_strategies.launchers.local import LocalLauncher as LocalLauncher
    from fulmen_strategies.launchers.processes import ProcessLauncher as ProcessLauncher
    from fulmen_strategies.model_parallel import ModelParallelStrategy as ModelParallelStrategy
    from fulmen_strategies.single import SingleDeviceStrategy as SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "DataParallelStrategy",
    "FSDPStrategy",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "LocalLauncher",
    "MPIEnvironment",
    "ModelParallelStrategy",
    "ProcessLauncher",
    "SLURMEnvironment",
    "SingleDeviceStrategy",
    "TorchCollectives",
    "TorchElasticEnvironment",
]

_HOME = {
    "DDPStrategy": "ddp",
    "DataParallelStrategy": "dp",
    "FSDPStrategy": "fsdp",
    "KubeflowEnvironment": "environments.kubeflow",
    "LSFEnvironment": "environments.lsf",
    "LightningEnvironment": "environments.local",
    "LocalLauncher": "launchers.local",
    "MPIEnvironment": "environments.mpi",
    "ModelParallelStrategy": "model_parallel",
    "ProcessLauncher": "launchers.processes",
    "SLURMEnvironment": "environments.slurm",
    "SingleDeviceStrategy": "single",
    "TorchCollectives": "collectives",
    "TorchElasticEnvironment": "environments.torchrun",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value: object = getattr(import_module(f"fulmen_strategies.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fulmen_strategies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
