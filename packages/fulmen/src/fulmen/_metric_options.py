"""What the arguments of ``self.log`` mean; checked once for every hook, name and combination of options."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fulmen._metric_entry import MetricOptions, Row
from fulmen_fabric.rank_zero import PossibleUserWarning, rank_zero_warn
from fulmen_protocols.errors import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen._metric_scope import LogScope
    from fulmen_protocols.collectives import ReduceOp

__all__ = ["LogCall", "group_ranks_of", "is_metric", "read_call", "warn_about_ranks"]

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


class LogCall(NamedTuple):
    """Where ``self.log`` was called, and with what arguments, but for the value and its weight."""

    scope: LogScope | None
    dataloader_idx: int | None
    name: str
    prog_bar: bool
    logger: bool | None
    on_step: bool | None
    on_epoch: bool | None
    reduce_fx: str | Callable[..., Any]
    sync_dist: bool
    sync_dist_group: object
    add_dataloader_idx: bool
    metric_attribute: str | None
    rank_zero_only: bool


def read_call(call: LogCall, metric: object, module: nn.Module | None) -> tuple[Row, LogScope]:
    """The metric that ``call`` names, with every default resolved, and the hook that it comes from.

    Args:
        call: as the user wrote it.
        metric: the metric object that was logged; None for a number.
        module: where the metric object is looked for.

    Raises:
        MisconfigurationException: the hook may not log, or the arguments contradict each other.
    """
    scope, on_step, on_epoch = _resolve_when(
        call.name, call.scope, call.on_step, call.on_epoch, call.add_dataloader_idx
    )
    options = MetricOptions(
        prog_bar=bool(call.prog_bar),
        logger=call.logger is None or bool(call.logger),
        on_step=on_step,
        on_epoch=on_epoch,
        op=_reduction(call.name, call.reduce_fx),
        sync=bool(call.sync_dist) and not call.rank_zero_only,
        add_dataloader_idx=bool(call.add_dataloader_idx),
        metric_attribute=None if metric is None else _metric_name(call.name, metric, call.metric_attribute, module),
        rank_zero_only=bool(call.rank_zero_only),
    )
    loader = call.dataloader_idx if call.add_dataloader_idx and scope.per_batch else None
    return Row(scope.hook, call.name, -1 if loader is None else loader, options), scope


def warn_about_ranks(row: Row, world_size: int, *, training: bool) -> None:
    """Say what users of several ranks may not expect of a number that is logged as ``row`` says."""
    name, options = row.name, row.options
    if options.rank_zero_only:
        return
    if options.sync and options.on_step and not training:
        rank_zero_warn(
            f"self.log({name!r}, on_step=True, sync_dist=True) in {row.hook}: ranks may evaluate different numbers of "
            "batches, so step values of evaluation are each rank's own; the epoch's value is synced.",
            PossibleUserWarning,
        )
    if options.on_epoch and not options.sync:
        rank_zero_warn(
            f"self.log({name!r}, ...) in {row.hook} records an epoch value on {world_size} ranks without "
            "sync_dist=True: each rank keeps its own, and loggers get rank 0's.",
            PossibleUserWarning,
        )


def _reduction(name: str, reduce_fx: str | Callable[..., Any]) -> ReduceOp:
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


def _resolve_when(
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


def _metric_name(name: str, metric: object, attribute: str | None, module: nn.Module | None) -> str:
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
