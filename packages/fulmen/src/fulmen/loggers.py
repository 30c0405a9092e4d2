"""Loggers by the names people look for here; they live in fulmen-loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
_REFUSED = {
    "LitLogger": "it logs to a service of Lightning's makers only, with their own package",
    "NeptuneLogger": "Lightning has removed it too; Neptune's own package logs from a loop",
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


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value: object = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _REFUSED:
        raise AttributeError(
            f"fulmen.loggers has no {name}: {_REFUSED[name]}. Any object with the members of fulmen_protocols.Logger "
            "can be given to Trainer(logger=...)."
        )
    raise AttributeError(f"module 'fulmen.loggers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
