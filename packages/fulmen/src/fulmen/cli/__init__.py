"""The command line: ``LightningCLI`` builds module, data and Trainer from arguments and files, and runs them.

Needs ``pip install 'fulmen[cli]'``. Each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen._instantiator import instantiate_module as instantiate_module
    from fulmen.cli.lightning_cli import LightningCLI as LightningCLI
    from fulmen.cli.optimizers import LRSchedulerCallable as LRSchedulerCallable
    from fulmen.cli.optimizers import LRSchedulerType as LRSchedulerType
    from fulmen.cli.optimizers import LRSchedulerTypeTuple as LRSchedulerTypeTuple
    from fulmen.cli.optimizers import LRSchedulerTypeUnion as LRSchedulerTypeUnion
    from fulmen.cli.optimizers import OptimizerCallable as OptimizerCallable
    from fulmen.cli.optimizers import ReduceLROnPlateau as ReduceLROnPlateau
    from fulmen.cli.optimizers import instantiate_class as instantiate_class
    from fulmen.cli.parser import ArgsType as ArgsType
    from fulmen.cli.parser import LightningArgumentParser as LightningArgumentParser
    from fulmen.cli.save_config import SaveConfigCallback as SaveConfigCallback

__all__ = [
    "ArgsType",
    "LRSchedulerCallable",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "LightningArgumentParser",
    "LightningCLI",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
    "instantiate_class",
    "instantiate_module",
]

_HOME = {
    "ArgsType": "fulmen.cli.parser",
    "LRSchedulerCallable": "fulmen.cli.optimizers",
    "LRSchedulerType": "fulmen.cli.optimizers",
    "LRSchedulerTypeTuple": "fulmen.cli.optimizers",
    "LRSchedulerTypeUnion": "fulmen.cli.optimizers",
    "LightningArgumentParser": "fulmen.cli.parser",
    "LightningCLI": "fulmen.cli.lightning_cli",
    "OptimizerCallable": "fulmen.cli.optimizers",
    "ReduceLROnPlateau": "fulmen.cli.optimizers",
    "SaveConfigCallback": "fulmen.cli.save_config",
    "instantiate_class": "fulmen.cli.optimizers",
    "instantiate_module": "fulmen._instantiator",
}


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOME:
            value: object = getattr(import_module(_HOME[name]), name)
            globals()[name] = value
            return value
        return submodule("fulmen.cli", name)


def __dir__() -> list[str]:
    return sorted(__all__)
