"""Optimizers and schedules on the command line: their types, and how their configuration becomes objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial, update_wrapper
from importlib import import_module
from types import MethodType
from typing import TYPE_CHECKING, Any, Union, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fulmen.module import LightningModule
from fulmen_fabric import rank_zero_warn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen.cli.parser import LightningArgumentParser

__all__ = [
    "LRSchedulerCallable",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "instantiate_class",
]

AUTOMATIC = "AUTOMATIC"


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's schedule with the name of the logged value that it follows, so that a configuration can say it."""

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
# typing.Union: jsonargparse reads these at run time, and users write Optional[...] and Union[...] around them.
LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]  # noqa: UP007
LRSchedulerType = Union[type[LRScheduler], type[ReduceLROnPlateau]]  # noqa: UP007
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], Union[LRScheduler, ReduceLROnPlateau]]  # noqa: UP007


def instantiate_class(args: Any | tuple[Any, ...], init: Mapping[str, Any]) -> Any:
    """Build the object that a configuration names.

    Args:
        args: the positional arguments, a tuple if several.
        init: ``{"class_path": "package.module.Class", "init_args": {...}}``.

    Raises:
        MisconfigurationException: there is no such class.
    """
    path = str(init.get("class_path", ""))
    module_name, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise MisconfigurationException(
            f"instantiate_class got class_path={path!r}, which cannot be imported ({error}). "
            "Give the full path of a class, such as 'torch.optim.Adam'."
        ) from error
    several = cast("Sequence[Any]", args) if isinstance(args, tuple) else [args]
    return cls(*several, **init.get("init_args") or {})


def with_class_path(cls: type, init_args: Any) -> dict[str, Any]:
    """The configuration of an object of ``cls``, whose arguments alone were parsed."""
    arguments = init_args.as_dict() if hasattr(init_args, "as_dict") else dict(init_args or {})
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def link_groups(parser: LightningArgumentParser) -> None:
    """Give each optimizer and schedule that was added with ``link_to`` to the argument it names."""
    for key, (cls, target) in {**parser.optimizers, **parser.lr_schedulers}.items():
        if target == AUTOMATIC:
            continue
        if isinstance(cls, tuple):
            parser.link_arguments(key, target)
        else:
            parser.link_arguments(key, target, compute_fn=partial(with_class_path, cls))


def automatic(
    parser: LightningArgumentParser, read: Callable[[str], Any], owner: str
) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
    """The configurations of the optimizer and the schedule that the module gets, or None where none was asked for.

    Args:
        parser: the parser to which they were added.
        read: gives the value of a key.
        owner: the class to name in errors.

    Raises:
        MisconfigurationException: several optimizers, or several schedules, are automatic.
    """
    optimizers = [key for key, (_, target) in parser.optimizers.items() if target == AUTOMATIC]
    schedulers = [key for key, (_, target) in parser.lr_schedulers.items() if target == AUTOMATIC]
    if not optimizers:
        return None
    if len(optimizers) > 1 or len(schedulers) > 1:
        raise MisconfigurationException(
            f"{owner} got {[*optimizers, *schedulers]!r} with link_to={AUTOMATIC!r}. configure_optimizers can be made "
            "from one optimizer and one schedule: give the others link_to='model.init_args.ARGUMENT' (or "
            "'model.ARGUMENT' where the class is fixed), and define configure_optimizers in the module."
        )

    def configuration(key: str, cls: type | tuple[type, ...]) -> dict[str, Any]:
        value = read(key)
        return value if isinstance(cls, tuple) else with_class_path(cls, value)

    optimizer = configuration(optimizers[0], parser.optimizers[optimizers[0]][0])
    if not optimizer:
        return None
    scheduler = configuration(schedulers[0], parser.lr_schedulers[schedulers[0]][0]) if schedulers else None
    return optimizer, scheduler or None


def override_configure_optimizers(
    module: LightningModule,
    optimizer: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    combine: Callable[..., Any],
    owner: str,
) -> None:
    """Give ``module`` a ``configure_optimizers`` that builds these from its parameters.

    They are built when it is called: the parameters may be made, moved or sharded after the module is.

    Args:
        module: gets the method; a warning says so where it has its own.
        optimizer: its configuration.
        scheduler: its configuration, if there is one.
        combine: called with the module, ``optimizer`` and ``lr_scheduler``; returns what ``configure_optimizers`` may.
        owner: the class to name in the warning.
    """
    if type(module).configure_optimizers is not LightningModule.configure_optimizers:
        rank_zero_warn(
            f"{type(module).__name__}.configure_optimizers is replaced by {owner}.configure_optimizers, because "
            f"{optimizer['class_path']} was asked for. Pass auto_configure_optimizers=False to {owner} to keep it."
        )

    def configure_optimizers(module: LightningModule) -> Any:
        built = instantiate_class(module.parameters(), optimizer)
        schedule = None if scheduler is None else instantiate_class(built, scheduler)
        return combine(module, optimizer=built, lr_scheduler=schedule)

    if not inspect.ismethod(combine):
        update_wrapper(configure_optimizers, combine)
    module.configure_optimizers = MethodType(configure_optimizers, module)  # type: ignore[method-assign]  # replaced on purpose
