"""What the arguments of ``self.log`` mean; checked once for every hook, name and combination of options."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fulmen_protocols.errors import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen._metric_scope import LogScope
    from fulmen_protocols.collectives import ReduceOp

__all__ = ["group_ranks_of", "is_metric", "metric_name", "reduction", "resolve_when"]

_REDUCTIONS: dict[object, ReduceOp] = {
    "mean": "mean",
    "avg": "mean",
    "sum": "sum",
    "min": "min",
    "max": "max",
    torch.mean: "mean",
    torch.sum: "sum",
    torch.min: "min",
    torch.amin: "min",
    torch.max: "max",
    torch.amax: "max",
    sum: "sum",
    min: "min",
    max: "max",
}


def reduction(name: str, reduce_fx: str | Callable[..., Any]) -> ReduceOp:
    """The reduction that ``reduce_fx`` names.

    Raises:
        MisconfigurationException: it is none that partial results can be combined by.
    """
    op = _REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx)
    if op is None:
        hint = did_you_mean(reduce_fx, ("mean", "sum", "min", "max")) if isinstance(reduce_fx, str) else ""
        raise MisconfigurationException(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}): use 'mean', 'sum', 'min' or 'max'.{hint} For anything else "
            "log a torchmetrics.Metric."
        )
    return op


def resolve_when(
    name: object, scope: LogScope | None, on_step: bool | None, on_epoch: bool | None, add_dataloader_idx: bool
) -> tuple[LogScope, bool, bool]:
    """The scope, ``on_step`` and ``on_epoch`` after the hook's defaults.

    Raises:
        MisconfigurationException: the hook may not log, or not in that way; the name is not one.
    """
    if scope is None:
        raise MisconfigurationException(
            f"self.log({name!r}, ...) was called while no hook of the Trainer runs: log from training_step, "
            "validation_step, test_step or a hook of an epoch; elsewhere use logger.log_metrics."
        )
    if not scope.allowed:
        raise MisconfigurationException(f"self.log({name!r}, ...) cannot be called in {scope.hook}: {scope.advice}.")
    if not isinstance(name, str) or not name:
        raise MisconfigurationException(f"self.log was given {name!r} as a name in {scope.hook}: use a non-empty str.")
    if add_dataloader_idx and "/dataloader_idx_" in name:
        raise MisconfigurationException(
            f"self.log({name!r}, ...): '/dataloader_idx_' is added by itself; leave it out of the name, or pass "
            "add_dataloader_idx=False."
        )
    on_step = scope.on_step if on_step is None else bool(on_step)
    on_epoch = scope.on_epoch if on_epoch is None else bool(on_epoch)
    if not scope.per_batch and (on_step or not on_epoch):
        raise MisconfigurationException(
            f"self.log({name!r}, on_step={on_step}, on_epoch={on_epoch}) in {scope.hook}, which runs once an epoch: "
            "it takes on_step=False, on_epoch=True (the default there)."
        )
    if not on_step and not on_epoch:
        raise MisconfigurationException(
            f"self.log({name!r}, on_step=False, on_epoch=False) in {scope.hook} records nothing: set one of them to "
            "True, or leave the call out."
        )
    return scope, on_step, on_epoch


def is_metric(value: object) -> bool:
    """Whether ``value`` is a ``torchmetrics.Metric``. If nobody imported torchmetrics, nothing is one."""
    torchmetrics = sys.modules.get("torchmetrics")
    metric = getattr(torchmetrics, "Metric", None)
    return metric is not None and isinstance(value, metric)


def metric_name(name: str, metric: object, attribute: str | None, module: nn.Module | None) -> str:
    """The attribute of ``module`` that holds ``metric``, by which a checkpoint and other ranks know it.

    Raises:
        MisconfigurationException: the module does not hold it there, or anywhere.
    """
    if module is None:
        raise MisconfigurationException(
            f"self.log({name!r}, ...) got a {type(metric).__name__}, and no module to look for it in: log it from the "
            "LightningModule that holds it."
        )
    if attribute is not None:
        found: object = module
        for part in attribute.split("."):
            found = getattr(found, part, None)
        if found is metric:
            return attribute
        raise MisconfigurationException(
            f"self.log({name!r}, metric_attribute={attribute!r}): that attribute of {type(module).__name__} is "
            f"{type(found).__name__}, not the object that was logged."
        )
    anything: Any = module  # torch's stubs leave named_modules partially unknown
    known: dict[str, object] = {path: child for path, child in anything.named_modules() if is_metric(child)}
    for path, child in known.items():
        if child is metric:
            return path
    raise MisconfigurationException(
        f"self.log({name!r}, ...) got a {type(metric).__name__} that is no attribute of {type(module).__name__}, so "
        f"it is neither moved to the device nor saved: assign it in __init__. Found: {', '.join(known) or 'none'}."
    )


def group_ranks_of(group: object, rank: int) -> tuple[int, ...] | None:
    """The global ranks of a ``torch.distributed`` group that this rank belongs to; None: all ranks.

    A rank outside of the group reduces over itself alone.
    """
    if group is None or not torch.distributed.is_initialized():
        return None
    if not isinstance(group, torch.distributed.ProcessGroup):
        return (rank,)
    ranks = torch.distributed.get_process_group_ranks(group)
    return tuple(ranks) if rank in ranks else (rank,)
