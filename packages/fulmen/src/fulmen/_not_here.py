"""Names that people look for in a module and that are elsewhere, or not there on purpose."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fulmen_protocols import MissingPackage

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["elsewhere", "no_module", "submodule"]

_GUIDE = "docs/guides/write-a-strategy.md"
_CONNECTORS = "what is read of Lightning's connectors has a public name on the Trainer"
_MODULES = {
    "fulmen.loggers.litlogger": "it logs to a service of Lightning's makers only, with their own package",
    "fulmen.loggers.neptune": "Lightning has removed it too; Neptune's own package logs from a loop",
    "fulmen.loops": "the loops are functions, in fulmen.fit, fulmen.evaluate and fulmen.predict; what callbacks read "
    "is in trainer.fit_loop and its siblings",
    "fulmen.plugins.collectives": "the interface is fulmen_protocols.Collectives; a loop has Fabric's all_reduce, "
    "all_gather and broadcast, and torch.distributed",
    "fulmen.plugins.precision.fsdp": "FSDPStrategy applies every precision itself; write "
    "Trainer(precision='bf16-mixed') or FSDPStrategy(mixed_precision=...)",
    "fulmen.strategies.launchers": f"a launcher has the members of fulmen_protocols.Launcher ({_GUIDE}); ours are "
    "in fulmen_strategies.launchers",
    "fulmen.strategies.parallel": f"a strategy of several processes needs no base class ({_GUIDE})",
    "fulmen.trainer.call": "hooks are bound once, before a run; call the method of the module or callback itself",
    "fulmen.trainer.connectors.callback_connector": _CONNECTORS,
    "fulmen.trainer.connectors.checkpoint_connector": _CONNECTORS,
    "fulmen.trainer.connectors.data_connector": _CONNECTORS,
    "fulmen.trainer.connectors.logger_connector": _CONNECTORS,
    "fulmen.trainer.connectors.signal_connector": _CONNECTORS,
    "fulmen.utilities.migration": "files of every Lightning version are migrated wherever they are loaded; "
    "fulmen_checkpoint.migrate(checkpoint) changes one that was loaded otherwise",
    "fulmen.utilities.model_registry": "it is a service of Lightning's makers, with their own package; give "
    "ModelCheckpoint a storage URL",
}
"""Modules of Lightning without a counterpart, and what to do instead."""


def submodule(module: str, name: str, refused: Mapping[str, str] | None = None) -> object:
    """The module ``name`` of a package, imported now, for ``module``'s ``__getattr__``.

    Importing Lightning imports all of its modules, so that programs write ``pl.callbacks.early_stopping.EarlyStopping``
    without importing them; ours are imported when they are named.

    Raises:
        AttributeError: there is no such module.
        ImportError: ``refused`` says why there is none, and ``from module import name`` would replace an AttributeError
            by its own, whose reader would not learn the reason; or the module itself says so.
    """
    if refused and name in refused:
        raise ImportError(f"{module} has no {name}: {refused[name]}.", name=module)
    path = f"{module}.{name}"
    if name.startswith("_") or find_spec(path) is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return import_module(path)


def no_module(module: str) -> ImportError:
    """What a module raises that is there for its name alone, so that importing it or one below it says why."""
    parent, _, name = module.rpartition(".")
    return ImportError(f"{parent} has no {name}: {_MODULES[module]}.", name=module)


def elsewhere(module: str, name: str, homes: Mapping[str, str], refused: Mapping[str, str]) -> object:
    """``name`` of the package that ``homes`` names for it, or a module of that name; for ``module``'s ``__getattr__``.

    Raises:
        AttributeError, ImportError: it is none of them; see ``submodule``.
        MissingPackage: that package is not installed.
    """
    if name not in homes:
        return submodule(module, name, refused)
    home = homes[name]
    try:
        package = import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise MissingPackage(
            f"{module}.{name} is part of {home.replace('_', '-')}, which is not installed. "
            f"Run: pip install 'fulmen[{home.removeprefix('fulmen_')}]'"
        ) from None
    value: object = getattr(package, name)
    return value
