"""Where processes stand, where Lightning has it."""

from typing import TYPE_CHECKING

from fulmen._not_here import elsewhere
from fulmen_protocols import ClusterEnvironment
from fulmen_strategies import (
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

if TYPE_CHECKING:
    from fulmen_xla import XLAEnvironment as XLAEnvironment

_ELSEWHERE = {"XLAEnvironment": "fulmen.plugins"}

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return elsewhere("fulmen.plugins.environments", name, _ELSEWHERE, {})
