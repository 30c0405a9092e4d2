"""Building a module or datamodule from the configuration that a command line left in its checkpoint.

A file is data, and data may not choose what code runs. So the only builder that is ever used is the one below, whatever
name a file gives, and ``refuse_foreign_code`` goes through the configuration first.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler

from fulmen.callbacks.callback import Callback
from fulmen.hparams import HyperparametersMixin, given_hyperparameters
from fulmen_protocols import CheckpointUnsafe, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CLASS_PATH", "INSTANTIATOR", "instantiate_module", "is_known", "refuse_foreign_code", "split"]

T = TypeVar("T")

CLASS_PATH = "_class_path"
INSTANTIATOR = "_instantiator"
OURS = "fulmen.cli.instantiate_module"
# Files of Lightning's command line hold the same configuration; they are built by the same function of ours.
_KNOWN = frozenset({OURS, "lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module"})

_BUILDING_BLOCKS = (nn.Module, Optimizer, LRScheduler, Dataset, Sampler, Callback, HyperparametersMixin)
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def is_known(hparams: Mapping[str, Any]) -> bool:
    """Whether hyperparameters are a configuration of the command line, to be built by ``instantiate_module``."""
    return hparams.get(INSTANTIATOR) in _KNOWN


def split(hparams: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The class that hyperparameters of the command line name, if they name one, and its arguments."""
    arguments = {key: value for key, value in hparams.items() if key not in (CLASS_PATH, INSTANTIATOR)}
    return cast("str | None", hparams.get(CLASS_PATH)), arguments


def instantiate_module(class_type: type[T], config: Mapping[str, Any]) -> T:
    """Build an object as the command line does, nested objects included.

    Args:
        class_type: the class, or a base class of the one that ``config["_class_path"]`` names.
        config: arguments of its ``__init__``, plain data or objects, in which ``class_path`` and ``init_args`` stand
            for objects to build.

    Raises:
        MisconfigurationException: ``config`` does not fit the class.
    """
    from fulmen._jsonargparse import ArgumentParser

    path, arguments = split(config)
    parser = ArgumentParser(exit_on_error=False)
    value: dict[str, Any] = arguments
    if path is None:
        parser.add_class_arguments(class_type, "module", fail_untyped=False)
    else:
        parser.add_subclass_arguments(class_type, "module", fail_untyped=False)
        value = {"class_path": path, "dict_kwargs": arguments}
    try:
        parsed = parser.parse_object({"module": value})
    except Exception as error:
        raise MisconfigurationException(
            f"the configuration {sorted(arguments)!r} does not build a {path or class_type.__name__}: {error}"
        ) from error
    cls = class_type if path is None else cast("type[T]", resolve_name(path))
    # What the object saves of itself is the configuration again: objects in its place could not be loaded safely.
    with given_hyperparameters(cls, {**config, INSTANTIATOR: OURS}):
        return cast("T", parser.instantiate(parsed).module)


def refuse_foreign_code(class_type: type, config: Mapping[str, Any], source: str) -> None:
    """Raise unless building ``config`` runs only code that this process has chosen to import.

    A class that the file names must be imported already, and be a building block of training (module, optimizer,
    schedule, data set, sampler, callback, data module) or belong to the package of the class that is being loaded.
    A text that could be taken for a function must name one of torch, or one of that package.

    Args:
        class_type: what is being loaded.
        config: from the file; values that the caller gave are not part of it.
        source: the file, for the error.

    Raises:
        CheckpointUnsafe: it names other code.
    """
    path, arguments = split(config)
    target = class_type
    if path is not None:
        found = _imported(path)
        if not isinstance(found, type) or not issubclass(found, class_type):
            state = "which is not imported" if found is None else f"which is no subclass of {class_type.__name__}"
            raise CheckpointUnsafe(
                f"{source} was written for {path!r}, {state}. Import the module that defines it first, and call "
                "load_from_checkpoint on it or on a base class of it."
            )
        target = found
    home = target.__module__.partition(".")[0]
    for key, named, is_class in _references(arguments, ""):
        found = _imported(named)
        if is_class:
            allowed = isinstance(found, type) and (_home(found) == home or issubclass(found, _BUILDING_BLOCKS))
        else:
            allowed = not _is_importable(named) or (found is not None and _home(found) in (home, "torch"))
        if not allowed:
            raise CheckpointUnsafe(
                f"{source} gives {key}={named!r}, and a file may not choose code to run: that is "
                f"{'not imported' if found is None else 'no building block of training'}. If you trust it, import its "
                f"module, pass {key.partition('.')[0]}=... yourself, or load with weights_only=False."
            )


def _references(value: object, key: str) -> Iterator[tuple[str, str, bool]]:
    """Every text in a configuration that can name code: its key, the text, and whether it is a ``class_path``."""
    if isinstance(value, Mapping):
        for name, item in cast("Mapping[object, object]", value).items():
            if name == "class_path":
                yield key, str(item), True
            else:
                inner = key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".lstrip(".")
                yield from _references(item, inner)
    elif isinstance(value, (list, tuple)):
        for item in cast("Iterable[object]", value):
            yield from _references(item, key)
    elif isinstance(value, str) and _DOTTED.fullmatch(value):
        yield key, value, False


def _imported(path: str) -> object | None:
    """What a dotted path names, if its module is imported; nothing is imported for it."""
    module, _, names = path.rpartition(".")
    rest = [names]
    while module and module not in sys.modules:
        module, _, name = module.rpartition(".")
        rest.insert(0, name)
    found: object | None = sys.modules.get(module)
    for name in rest:
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
        if found is None and module and rest == [name]:
            # Packages that import their members when they are named, ours for one, have them nowhere else.
            found = getattr(sys.modules[module], name, None) if module.partition(".")[0] == "fulmen" else None
    return found


def _home(found: object) -> str:
    module = getattr(found, "__module__", None) or getattr(type(found), "__module__", "")
    return str(module).partition(".")[0]


def _is_importable(path: str) -> bool:
    top = path.partition(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None
