"""Metrics in checkpoints: the running epoch as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fulmen._metric_entry import MetricEntry, MetricObject, MetricOptions, Row, combine_numbers
from fulmen._metric_options import is_metric
from fulmen._metric_read import read_scalars
from fulmen._metric_scope import scope_for
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["load_entries", "merge_states", "save_entries"]

_VERSION = 1


def save_entries(stage: str, entries: Iterable[MetricEntry]) -> dict[str, Any]:
    """Everything that was logged in the running epoch. One host read for all of it."""
    kept = list(entries)
    totals = [entry.total() for entry in kept]
    lasts = [entry.step_value() for entry in kept]
    numbers = iter(read_scalars([value for value in (*totals, *lasts) if value is not None]))
    total_numbers = [None if value is None else next(numbers) for value in totals]
    last_numbers = [None if value is None else next(numbers) for value in lasts]
    return {
        "version": _VERSION,
        "stage": stage,
        "entries": [
            {
                "hook": entry.row.hook,
                "name": entry.row.name,
                "dataloader_idx": entry.row.dataloader_idx,
                "options": entry.options._asdict(),
                "total": total,
                "weight": entry.weight,
                "last": last,
                "is_double": entry.dtype is torch.float64,
                "metric": None if entry.metric is None else _metric_state(entry.metric),
            }
            for entry, total, last in zip(kept, total_numbers, last_numbers, strict=True)
        ],
    }


def load_entries(
    stage: str, state: dict[str, Any], module: nn.Module | None, device: torch.device
) -> Iterator[MetricEntry]:
    """The saved metrics; provisional, so that a run which now logs them with other options starts them anew.

    Raises:
        CheckpointError: the state is another stage's, or of a version that is not known.
    """
    if state.get("version") != _VERSION or state.get("stage") != stage:
        raise CheckpointError(
            f"metrics of stage {stage!r} cannot be restored from a state of stage {state.get('stage')!r}, version "
            f"{state.get('version')!r}: expected version {_VERSION} of the same stage."
        )
    for saved in state["entries"]:
        row = Row(saved["hook"], saved["name"], saved["dataloader_idx"], MetricOptions(**saved["options"]))
        entry = MetricEntry(row, per_batch=scope_for(row.hook).per_batch)
        entry.provisional = True
        entry.host_total = saved["total"]
        entry.weight = saved["weight"]
        entry.last = saved["last"]
        entry.synced_from = entry.last
        entry.dtype = torch.float64 if saved["is_double"] else None
        if saved["metric"] is not None:
            entry.metric = _restore_metric(row, saved["metric"], module, device)
        yield entry


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What several ranks logged, as if one had logged it all; None of no rank."""
    merged: dict[tuple[str, str, int], dict[str, Any]] = {}
    for saved in (entry for state in states for entry in state["entries"]):
        key = (saved["hook"], saved["name"], saved["dataloader_idx"])
        known = merged.get(key)
        if known is None:
            parts = None if saved["metric"] is None else {**saved["metric"], "parts": [saved["metric"]["states"]]}
            merged[key] = {**saved, "metric": parts}
            continue
        totals = [total for total in (known["total"], saved["total"]) if total is not None]
        known["total"] = combine_numbers(totals, saved["options"]["op"]) if totals else None
        known["weight"] += saved["weight"]
        if known["metric"] is not None and saved["metric"] is not None:
            known["metric"]["updates"] += saved["metric"]["updates"]
            known["metric"]["parts"].append(saved["metric"]["states"])
    return {**states[0], "entries": list(merged.values())} if states else None


def _metric_state(metric: MetricObject) -> dict[str, Any]:
    """The metric's states, whether or not the user made them persistent: without them the epoch cannot go on."""
    names: Iterable[str] = getattr(metric, "_defaults", {})
    return {
        "updates": getattr(metric, "_update_count", 0),
        "states": {name: _on_cpu(getattr(metric, name)) for name in names},
    }


def _restore_metric(
    row: Row, saved: dict[str, Any], module: nn.Module | None, device: torch.device
) -> MetricObject | None:
    path = row.options.metric_attribute or ""
    metric: Any = module
    for part in path.split("."):
        metric = getattr(metric, part, None)
    if not is_metric(metric):
        rank_zero_warn(
            f"the checkpoint holds metric object {path!r}, logged as {row.name!r}; {type(module).__name__} has no such "
            "metric, so its epoch starts anew."
        )
        return None
    metric.reset()
    parts = saved.get("parts") or [saved["states"]]
    for name in parts[0]:
        setattr(metric, name, _on_device(_joined(metric, name, [part[name] for part in parts]), device))
    metric._update_count = saved["updates"]
    result: MetricObject = metric
    return result


def _joined(metric: Any, name: str, values: list[Any]) -> object:
    """One state of several ranks, by the reduction that the metric uses between them."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    reduce = metric._reductions[name]
    return values[0] if reduce is None else reduce(torch.stack(values))


def _on_cpu(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, list):
        return [_on_cpu(item) for item in cast("list[object]", value)]
    return value


def _on_device(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, list):
        return [_on_device(item, device) for item in cast("list[object]", value)]
    return value
