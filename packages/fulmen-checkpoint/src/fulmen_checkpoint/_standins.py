"""Reading files that name classes of Lightning: inert stand-ins take their place, so that nothing is imported or run.

Lightning before 2.0 keyed the state of callbacks by their class and stored hyperparameters in a dict class of its own.
Only names on the list below are replaced; any other is refused as before.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Inert", "load"]

_NAME = re.compile(r"GLOBAL (\S+)")
_LIGHTNING = re.compile(r"(pytorch_lightning|lightning\.pytorch|lightning_fabric|lightning\.fabric)(\.\w+)+")
_DICTS = re.compile(r".*\.AttributeDict")
_ALLOWED_BESIDES = frozenset({"argparse.Namespace"})
_MOST_NAMES = 100


class Inert:
    """Stands for an object of a class that was not imported: holds what the file says of it and does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args


def load(read: Callable[[], object]) -> object:
    """What ``read`` gives, with Lightning's classes in it as plain data.

    A class becomes its name, an enum its value, a namespace or an attribute dict a dict.

    Raises:
        pickle.UnpicklingError: as ``read`` raises it, for any other class.
    """
    names: dict[str, type] = {}
    while True:
        try:
            if not names:
                return read()
            with torch.serialization.safe_globals([(cls, name) for name, cls in names.items()]):
                return _plain(read(), {})
        except pickle.UnpicklingError as error:
            found = _NAME.search(str(error))
            name = found[1] if found else ""
            known = _LIGHTNING.fullmatch(name) or name in _ALLOWED_BESIDES
            if not known or name in names or len(names) >= _MOST_NAMES:
                raise
            names[name] = dict if _DICTS.fullmatch(name) else _stand_in(name)


def _stand_in(name: str) -> type:
    module, _, qualname = name.rpartition(".")
    return type(qualname, (Inert,), {"__module__": module})


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, type) and issubclass(value, Inert):
        return value.__qualname__
    if isinstance(value, Inert):
        state = {key: item for key, item in vars(value).items() if key != "args"}
        args = cast("tuple[object, ...]", vars(value).get("args", ()))
        return _plain(state, seen) if state else _plain(args[0], seen) if args else type(value).__qualname__
    if type(value) in (dict, OrderedDict):
        made: dict[Any, Any] = type(value)()
        seen[id(value)] = made
        made.update({_plain(key, seen): _plain(item, seen) for key, item in value.items()})
        if type(value) is OrderedDict:
            vars(made).update(vars(value))
        return made
    if type(value) in (list, tuple):
        return type(value)(_plain(item, seen) for item in value)
    return value
