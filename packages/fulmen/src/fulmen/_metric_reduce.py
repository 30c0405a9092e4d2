"""Reducing metrics over ranks: the arithmetic on both sides of one message."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fulmen._metric_entry import combine_numbers
from fulmen_fabric.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.distributed import ProcessGroup

    from fulmen._metric_entry import MetricEntry, Row, Scalar
    from fulmen._metric_sync import Schema

    Entries = Mapping[tuple[str, str, int], MetricEntry]
    Adopt = Callable[[Row], MetricEntry]

__all__ = ["computed", "only_tensor", "reduce_epoch_values", "reduce_step_values"]


def only_tensor(name: str, value: object) -> Tensor:
    """``value`` of a metric object, which must be a tensor.

    Raises:
        ValueError: it is a dict or something else that has no one name to be logged under.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the metric object logged as {name!r} gave a {type(value).__name__}, and one name is one tensor: "
            "compute() it yourself at the epoch's end and log_dict the parts, or use a MetricCollection."
        )
    return value


def computed(entry: MetricEntry, group: ProcessGroup | None = None) -> Tensor:
    """The epoch's value of ``entry``'s metric object, of any shape; it synchronises by itself if it is told to.

    Args:
        entry: has a metric object.
        group: whom it synchronises with, unless the user has told it.

    Raises:
        ValueError: it is no tensor.
    """
    metric: Any = entry.metric
    if group is None or getattr(metric, "process_group", None) is not None:
        return only_tensor(entry.row.name, metric.compute())
    metric.process_group = group
    try:
        return only_tensor(entry.row.name, metric.compute())
    finally:
        metric.process_group = None  # modules are copied and pickled, groups cannot be


def reduce_epoch_values(schema: Schema, entries: Entries, adopt: Adopt, data_group: ProcessGroup | None = None) -> None:
    """Compute the epoch's value of every metric that some rank wants over all ranks. Blocks; called by all ranks.

    A mean is the sum of all ranks' weighted sums over the sum of their weights, in float64 and in rank order, so it is
    the same on every rank. Metric objects synchronise by themselves, which only works if every rank takes part: where
    one rank has not logged the object in this epoch, the others compute it from their own data. Ranks that read the
    same data count once; ``data_group`` are those among which the data are split, None: all.
    """
    mine = {
        identity: entry
        for identity, entry in entries.items()
        if entry.on_epoch and (entry.options.sync or entry.metric is not None)
    }
    # Host read: a declared point. The numbers are needed on the host to decide whether a second round is due.
    messages: list[list[float]] = _gather(schema, mine)
    if any(message[0] for message in messages):
        schema.exchange([entry.row for entry in mine.values()])
        messages = _gather(schema, mine)
    count = len(schema.rows)
    given = torch.tensor([message[1 : 1 + count] for message in messages])
    spoken = cast("list[list[float]]", schema.only_once(given).tolist())
    metric_ranks = range(len(messages)) if data_group is None else torch.distributed.get_process_group_ranks(data_group)
    for index, row in enumerate(schema.rows):
        entry = mine.get(row.identity) or adopt(row)
        weights = [message[1 + index] for message in messages]
        values = [message[1 + count + index] for message in messages]
        if row.options.metric_attribute is not None:
            if entry.metric is not None and entry.weight:
                alone = not all(weights[rank] for rank in metric_ranks)
                entry.epoch_value = _compute(entry, data_group, alone=alone)
            continue
        if entry.group_ranks is None:
            taking_part = [rank for rank in range(len(messages)) if spoken[rank][index]]
        else:
            taking_part = [rank for rank in entry.group_ranks if weights[rank]]
        if not taking_part:
            continue
        value = combine_numbers([values[rank] for rank in taking_part], row.options.op)
        if row.options.op == "mean":
            value /= sum(weights[rank] for rank in taking_part)
        entry.epoch_value = (
            torch.tensor(value, dtype=torch.float64) if entry.dtype is torch.float64 else value  # keeps the precision
        )
        entry.reduced_weight = entry.weight


def _gather(schema: Schema, mine: Entries) -> list[list[float]]:
    contributions: dict[tuple[str, str, int], tuple[Scalar, float]] = {}
    changed = False
    for identity, entry in mine.items():
        if identity not in schema:
            changed = True
            continue
        total = 0.0 if entry.metric is not None else entry.total()
        if total is not None and entry.weight:
            contributions[identity] = (total, entry.weight)
    return cast("list[list[float]]", schema.gather(changed=changed, mine=contributions).tolist())


def _compute(entry: MetricEntry, group: ProcessGroup | None, *, alone: bool) -> Any:
    metric: Any = entry.metric
    if not alone:
        return computed(entry, group)
    rank_zero_warn(
        f"metric object {entry.row.name!r} was not logged on every rank in this epoch; its value is each rank's own."
    )
    # Its sync is a collective that the other ranks would not join.
    asked, metric._to_sync = metric._to_sync, False
    try:
        return computed(entry)
    finally:
        metric._to_sync = asked
        metric._computed = None  # a value over all ranks must not be answered from this cache


def reduce_step_values(
    schema: Schema, entries: Entries, adopt: Adopt, *, ask: Callable[[bool], bool] | None, device: torch.device
) -> None:
    """Replace the latest step values by their reduction over the ranks that logged one since the last call.

    Args:
        schema: the step metrics that ranks have agreed on.
        entries: this rank's metrics.
        adopt: makes an entry for a metric that so far only other ranks log.
        ask: told at a declared point whether this rank knows new metrics; answers, alike on all ranks, whether they are
            exchanged now.
        device: where values are wanted.
    """
    mine = {
        identity: entry
        for identity, entry in entries.items()
        if entry.options.sync and entry.options.on_step and entry.metric is None
    }
    is_new = ask is not None and ask(any(identity not in schema for identity in mine))
    if is_new:
        schema.exchange([entry.row for entry in mine.values()])
    count = len(schema.rows)
    if not count:
        return
    # Older values count too the first time, so that a rank which only listens has something to show.
    gathered = schema.gather(changed=False, mine=_fresh(schema, mine, also_old=is_new))
    weights, values = gathered[:, 1 : 1 + count], gathered[:, 1 + count :]
    spoken = schema.only_once(weights)
    reduced: dict[tuple[str, tuple[int, ...] | None], Tensor] = {}
    present: dict[tuple[int, ...] | None, Tensor] = {}
    for index, row in enumerate(schema.rows):
        entry = mine.get(row.identity) or adopt(row)
        group, op = entry.group_ranks, row.options.op
        if (op, group) not in reduced:
            if group is None:
                reduced[op, group] = _reduce(values, spoken, op)
            else:
                reduced[op, group] = _reduce(values[list(group)], weights[list(group)], op)
            present[group] = (weights if group is None else weights[list(group)]).any(0)
        new = reduced[op, group][index]
        old = entry.last
        if old is not None and old is entry.synced_from:  # not logged here in this batch, perhaps nowhere
            new = torch.where(present[group][index], new, torch.as_tensor(old, dtype=new.dtype, device=new.device))
        entry.last = entry.synced_from = new.to(device=device, dtype=entry.result_dtype)


def _fresh(
    schema: Schema, mine: Entries, *, also_old: bool = False
) -> dict[tuple[str, str, int], tuple[Scalar, float]]:
    contributions: dict[tuple[str, str, int], tuple[Scalar, float]] = {}
    for identity, entry in mine.items():
        value = entry.step_value()
        if identity in schema and value is not None and (also_old or value is not entry.synced_from):
            contributions[identity] = (value, 1.0)
    return contributions


def _reduce(values: Tensor, weights: Tensor, op: str) -> Tensor:
    """Over dimension 0, where ``weights`` is not 0; both of shape (ranks, metrics)."""
    there = weights != 0
    if op == "min":
        return values.masked_fill(~there, math.inf).amin(0)
    if op == "max":
        return values.masked_fill(~there, -math.inf).amax(0)
    total = values.masked_fill(~there, 0.0).sum(0)
    return total / there.sum(0) if op == "mean" else total
