"""What ``Fabric`` is given, checked: each refusal in one place, in one sentence."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, TypeVar, cast

from torch import nn
from torch.utils.data import DataLoader

from fulmen_fabric.compiled import uncompiled
from fulmen_fabric.loaders import FabricDataLoader
from fulmen_fabric.optimizers import FabricOptimizer
from fulmen_fabric.wrappers import FabricModule, unwrap
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

__all__ = [
    "as_list",
    "is_under_cli",
    "nothing",
    "overridden",
    "require_at_least_one",
    "require_callable",
    "require_loader",
    "require_module",
    "require_no_group",
    "require_no_meta",
    "require_optimizer",
    "require_prefetch",
]

T = TypeVar("T")


def is_under_cli() -> bool:
    """Whether a command line (``fulmen run``) has started this script, in every process of the run."""
    return os.environ.get("LT_CLI_USED", "0") == "1"


def overridden(name: str, value: T, default: T) -> T:
    """The argument ``name`` of a Fabric, or what the environment says instead."""
    variable = f"LT_{name.upper()}"
    found = os.environ.get(variable)
    if found is None:
        return value
    if is_under_cli() and value != default and found != str(value):
        raise MisconfigurationException(
            f"Fabric({name}={value!r}) in the code contradicts {variable}={found!r}, which the command line set. "
            f"Remove {name}= from the code, or --{name.replace('_', '-')} from the command line."
        )
    if name != "num_nodes":
        return cast("T", found)
    if not found.isdigit():
        raise MisconfigurationException(f"{variable}={found!r} is not a whole number.")
    return cast("T", int(found))


def as_list(given: object) -> list[object]:
    if given is None:
        return []
    return list(cast("Sequence[object]", given)) if isinstance(given, (list, tuple)) else [given]


def nothing() -> None:
    """The script itself is the function."""


def require_callable(function: object) -> None:
    if not callable(function):
        raise MisconfigurationTypeError(
            f"launch got {function!r}, which cannot be called. Pass a function, or nothing."
        )
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a function made in C tells no signature
        return
    if not parameters:
        name = getattr(function, "__name__", repr(function))
        raise MisconfigurationTypeError(f"launch got {name}(), which takes no argument. Its first one is the Fabric.")


def require_no_group(what: str, group: object) -> None:
    if group is not None:
        raise MisconfigurationException(
            f"{what} got group={group!r}; it runs among all ranks. Use torch.distributed for a part of them."
        )


def require_module(what: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise MisconfigurationTypeError(f"{what} got {type(module).__name__} for the module. Pass a torch.nn.Module.")
    if isinstance(uncompiled(module), FabricModule):
        raise MisconfigurationException(
            f"{what} got a {type(unwrap(module)).__name__} that has been set up before. Pass your own module, once."
        )


def require_loader(loader: object) -> None:
    if isinstance(loader, FabricDataLoader):
        raise MisconfigurationException(
            "setup_dataloaders got a loader that has been set up before. Pass your own DataLoader, once."
        )
    if not isinstance(loader, DataLoader):
        raise MisconfigurationTypeError(
            f"setup_dataloaders got {type(loader).__name__}. Pass a torch.utils.data.DataLoader."
        )


def require_optimizer(what: str, optimizer: object) -> None:
    if isinstance(optimizer, FabricOptimizer):
        raise MisconfigurationException(
            f"{what} got a {type(optimizer.optimizer).__name__} that has been set up before. Pass your own optimizer, "
            "once."
        )
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        name = type(optimizer).__name__
        also = " A scheduler goes to scheduler=, if anywhere." if hasattr(optimizer, "get_last_lr") else ""
        raise MisconfigurationTypeError(
            f"{what} got a {name} for an optimizer. Pass the module first, then optimizers alone.{also}"
        )


def require_no_meta(optimizer: Optimizer) -> None:
    if any(parameter.is_meta for group in optimizer.param_groups for parameter in group["params"]):
        raise MisconfigurationRuntimeError(
            f"{type(optimizer).__name__} holds parameters on the meta device. "
            "Make it after setup_module(), from the parameters of the module that it returns."
        )


def require_at_least_one(what: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise MisconfigurationException(f"{what} got {name}={count!r}. Use a whole number of at least 1.")


def require_prefetch(prefetch: int, move_to_device: bool) -> None:
    if isinstance(prefetch, bool) or prefetch < 0:
        raise MisconfigurationException(
            f"setup_dataloaders got prefetch={prefetch!r}. Use a number of batches, or 0 to copy each when it is used."
        )
    if prefetch and not move_to_device:
        raise MisconfigurationException(
            f"setup_dataloaders got prefetch={prefetch!r} and move_to_device=False: batches that stay where they are "
            "cannot be copied ahead. Drop one of the two."
        )
