"""The Trainer's arguments on the command line.

Most are read from its signature. Those that take objects are typed there by Protocols, which any class may meet; here
each gets a kind of class that can be chosen by its short name, or by the full path of anything with the right methods.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fulmen._jsonargparse import ArgumentParser
from fulmen.trainer import Trainer
from fulmen_protocols.callback import HOOKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["add_trainer_arguments"]


class _Kind(type):
    """Classes that a Trainer's argument takes: its subclasses are those with the methods, whatever they inherit."""

    facade: str
    """The module whose classes have short names."""
    abilities: tuple[tuple[str, ...], ...]
    """Sets of attributes; a class with all of one set is of this kind."""

    def __subclasscheck__(cls, other: type) -> bool:
        return super().__subclasscheck__(other) or any(
            all(hasattr(other, name) for name in names) for names in cls.abilities
        )

    def __instancecheck__(cls, instance: object) -> bool:
        return cls.__subclasscheck__(type(instance))

    # jsonargparse looks here, and in the subclasses of what it finds, for a class with a given short name.
    def __subclasses__(cls) -> list[type]:
        module = import_module(cls.facade)
        found: list[type] = []
        for name in module.__all__:
            try:
                value = getattr(module, name)
            except ImportError:  # it needs a library that is not installed
                continue
            is_protocol = getattr(value, "_is_protocol", False)  # it has the methods, and no object is made of it
            if isinstance(value, type) and not is_protocol and cls.__subclasscheck__(value):
                found.append(value)
        return [one for one in found if not any(base in found for base in one.__mro__[1:])]


class AcceleratorKind(metaclass=_Kind):
    """An accelerator."""

    facade, abilities = "fulmen.accelerators", (("parse_devices", "get_parallel_devices"),)


class StrategyKind(metaclass=_Kind):
    """A strategy."""

    facade, abilities = "fulmen.strategies", (("setup_environment", "place", "prepare_optimizers"),)


class LoggerKind(metaclass=_Kind):
    """A logger."""

    facade, abilities = "fulmen.loggers", (("log_metrics", "log_hyperparams"),)


class CallbackKind(metaclass=_Kind):
    """A callback: anything with at least one hook."""

    facade, abilities = "fulmen.callbacks", tuple((hook,) for hook in HOOKS)


class ProfilerKind(metaclass=_Kind):
    """A profiler."""

    facade, abilities = "fulmen.profilers", (("start", "stop", "summary"),)


class PluginKind(metaclass=_Kind):
    """A precision, a checkpoint IO or a cluster environment."""

    facade = "fulmen.plugins"
    abilities = (
        ("plan", "convert_module"),
        ("save_checkpoint", "load_checkpoint", "remove_checkpoint"),
        ("main_address", "global_rank", "local_rank"),
    )


# A class's short name goes before a backend's name: any text could be one.
_TYPES: Mapping[str, tuple[Any, str]] = {
    "accelerator": (AcceleratorKind | str, "What to compute on, by name or as an object."),
    "strategy": (StrategyKind | str, "How the model is spread over devices, by name or as an object."),
    "logger": (LoggerKind | list[LoggerKind] | bool | None, "Where metrics go: one logger, several, or none."),
    "callbacks": (list[CallbackKind] | CallbackKind | None, "What happens beside training."),
    "profiler": (ProfilerKind | str | None, "What measures the run, by name or as an object."),
    "plugins": (PluginKind | list[PluginKind] | None, "Parts that replace the default ones."),
}


def add_trainer_arguments(parser: ArgumentParser, cls: type[Trainer], key: str) -> list[str]:
    """Add the arguments of a Trainer class below ``key`` and return their keys."""
    options: dict[str, Any] = {"fail_untyped": False, "instantiate": False, "sub_configs": True}
    # An own parser tells which arguments there are, those that a subclass passes on in **kwargs included.
    known = ArgumentParser()
    there = known.add_class_arguments(cls, key, **options)
    special = [name for name in _TYPES if f"{key}.{name}" in there and _is_of_trainer(cls, name)]
    added = parser.add_class_arguments(cls, key, skip=set(special), **options)
    assert parser.groups is not None  # it has the one that was just added
    group = parser.groups[key]
    for name in special:
        annotation, text = _TYPES[name]
        default = known.get_default(f"{key}.{name}")
        group.add_argument(f"--{key}.{name}", type=annotation, default=default, help=text, sub_configs=True)
    return [*added, *(f"{key}.{name}" for name in special)]


def _is_of_trainer(cls: type, name: str) -> bool:
    """Whether it is our own Trainer that declares ``name``; a subclass, or a function, may give it another type."""
    for declares in _signatures(cls):
        if name in declares.parameters:
            return declares is _OURS
    return True


_OURS = inspect.signature(Trainer.__init__)


def _signatures(cls: type) -> Iterable[inspect.Signature]:
    function = getattr(cls, "wrapped_function", None)
    if function is not None:  # jsonargparse's class for a function
        yield inspect.signature(function)
    for base in cls.__mro__:
        if base is Trainer:
            yield _OURS
        elif "__init__" in vars(base):
            yield inspect.signature(vars(base)["__init__"])
