"""Loggers by the names people look for here; they live in fulmen-loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen._silent import DummyLogger as DummyLogger
    from fulmen_loggers import CometLogger as CometLogger
    from fulmen_loggers import CSVLogger as CSVLogger
    from fulmen_loggers import MLFlowLogger as MLFlowLogger
    from fulmen_loggers import TensorBoardLogger as TensorBoardLogger
    from fulmen_loggers import WandbLogger as WandbLogger
    from fulmen_loggers import merge_dicts as merge_dicts
    from fulmen_protocols import Logger as Logger

_HOME = {
    "CSVLogger": "fulmen_loggers",
    "CometLogger": "fulmen_loggers",
    "DummyLogger": "fulmen._silent",
    "Logger": "fulmen_protocols",
    "MLFlowLogger": "fulmen_loggers",
    "TensorBoardLogger": "fulmen_loggers",
    "WandbLogger": "fulmen_loggers",
    "merge_dicts": "fulmen_loggers",
}
_OBJECT = "Any object with the members of fulmen_protocols.Logger can be given to Trainer(logger=...)"
_REFUSED = {
    "LitLogger": f"it logs to a service of Lightning's makers only, with their own package. {_OBJECT}",
    "NeptuneLogger": f"Lightning has removed it too; Neptune's own package logs from a loop. {_OBJECT}",
}

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "merge_dicts",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOME:
            value: object = getattr(import_module(_HOME[name]), name)
            globals()[name] = value
            return value
        return submodule("fulmen.loggers", name, _REFUSED)


def __dir__() -> list[str]:
    return sorted(__all__)
