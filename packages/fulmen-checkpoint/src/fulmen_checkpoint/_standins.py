"""Reading files that name classes of Lightning: inert stand-ins take their place, so that nothing is imported or run.

Lightning before 2.0 keyed the state of callbacks by their class and stored hyperparameters in a dict class of its own.
Only names on the list below are replaced; any other is refused as before.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def _plain(value: object, seen: dict[int, object]) -> object:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, type):
        return value.__qualname__ if issubclass(value, Inert) else cast("object", value)
    if isinstance(value, Inert):
        attributes = cast("dict[str, object]", vars(value))
        state = {key: item for key, item in attributes.items() if key != "args"}
        args = cast("tuple[object, ...]", attributes.get("args", ()))
        return _plain(state, seen) if state else _plain(args[0], seen) if args else type(value).__qualname__
    kind: type = type(value)
    if kind is dict or kind is OrderedDict:
        table = cast("dict[object, object]", value)
        made: dict[object, object] = OrderedDict() if kind is OrderedDict else {}
        seen[id(value)] = made
        made.update({_plain(key, seen): _plain(item, seen) for key, item in table.items()})
        if isinstance(made, OrderedDict):
            vars(made).update(vars(table))
        return made
    if kind is list or kind is tuple:
        items = [_plain(item, seen) for item in cast("Iterable[object]", value)]
        return items if kind is list else tuple(items)
    return value
