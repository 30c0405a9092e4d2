"""Helpers by the names people look for here. Most live in the packages they belong to, and work there without this one.

Each is imported when it is first named. The modules below this one have Lightning's names, so that imports like
``fulmen.utilities.rank_zero`` work as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen.hparams import AttributeDict as AttributeDict
    from fulmen.utilities.distributed import is_shared_filesystem as is_shared_filesystem
    from fulmen.utilities.enums import GradClipAlgorithmType as GradClipAlgorithmType
    from fulmen.utilities.enums import LightningEnum as LightningEnum
    from fulmen.utilities.grads import grad_norm as grad_norm
    from fulmen.utilities.parameter_tying import find_shared_parameters as find_shared_parameters
    from fulmen.utilities.parameter_tying import set_shared_parameters as set_shared_parameters
    from fulmen.utilities.parsing import is_picklable as is_picklable
    from fulmen_data import CombinedLoader as CombinedLoader
    from fulmen_data import suggested_max_num_workers as suggested_max_num_workers
    from fulmen_fabric import Throughput as Throughput
    from fulmen_fabric import ThroughputMonitor as ThroughputMonitor
    from fulmen_fabric import disable_possible_user_warnings as disable_possible_user_warnings
    from fulmen_fabric import measure_flops as measure_flops
    from fulmen_fabric import move_data_to_device as move_data_to_device
    from fulmen_fabric import rank_zero_deprecation as rank_zero_deprecation
    from fulmen_fabric import rank_zero_info as rank_zero_info
    from fulmen_fabric import rank_zero_only as rank_zero_only
    from fulmen_fabric import rank_zero_warn as rank_zero_warn

_HOME = {
    "AttributeDict": "fulmen.hparams",
    "CombinedLoader": "fulmen_data",
    "GradClipAlgorithmType": "fulmen.utilities.enums",
    "LightningEnum": "fulmen.utilities.enums",
    "Throughput": "fulmen_fabric",
    "ThroughputMonitor": "fulmen_fabric",
    "disable_possible_user_warnings": "fulmen_fabric",
    "find_shared_parameters": "fulmen.utilities.parameter_tying",
    "grad_norm": "fulmen.utilities.grads",
    "is_picklable": "fulmen.utilities.parsing",
    "is_shared_filesystem": "fulmen.utilities.distributed",
    "measure_flops": "fulmen_fabric",
    "move_data_to_device": "fulmen_fabric",
    "rank_zero_deprecation": "fulmen_fabric",
    "rank_zero_info": "fulmen_fabric",
    "rank_zero_only": "fulmen_fabric",
    "rank_zero_warn": "fulmen_fabric",
    "set_shared_parameters": "fulmen.utilities.parameter_tying",
    "suggested_max_num_workers": "fulmen_data",
}

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "GradClipAlgorithmType",
    "LightningEnum",
    "Throughput",
    "ThroughputMonitor",
    "disable_possible_user_warnings",
    "find_shared_parameters",
    "grad_norm",
    "is_picklable",
    "is_shared_filesystem",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "set_shared_parameters",
    "suggested_max_num_workers",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOME:
            value: object = getattr(import_module(_HOME[name]), name)
            globals()[name] = value
            return value
        return submodule("fulmen.utilities", name)


def __dir__() -> list[str]:
    return sorted(__all__)
