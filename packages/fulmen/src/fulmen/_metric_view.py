"""Metrics under the names that loggers, the progress bar and callbacks know them by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fulmen._metric_entry import MetricEntry, Scalar

__all__ = ["MetricView", "as_tensors", "epoch_view", "step_view"]


class MetricView:
    """Metrics under the names that three readers know them by. Values are device tensors, unread, or host numbers.

    Attributes:
        log: what loggers get.
        bar: what the progress bar shows.
        callback: what callbacks and schedulers monitor.
    """

    __slots__ = ("bar", "callback", "log")

    def __init__(self) -> None:
        self.log: dict[str, Scalar] = {}
        self.bar: dict[str, Scalar] = {}
        self.callback: dict[str, Scalar] = {}


def step_view(entries: Iterable[MetricEntry], *, with_callback: bool) -> MetricView:
    """The latest step values: ``name_step`` where an epoch value is recorded too, else ``name``."""
    view = MetricView()
    for entry in entries:
        options = entry.options
        value = entry.step_value() if options.on_step else None
        if value is None:
            continue
        if options.logger:
            view.log[entry.step_key] = value
        if options.prog_bar:
            view.bar[entry.step_key] = value
        if with_callback:
            view.callback[entry.plain_key] = value
            view.callback[entry.step_key] = value
    return view


def epoch_view(values: Iterable[tuple[MetricEntry, Scalar | None]]) -> MetricView:
    """The epoch's values: ``name_epoch`` where step values are recorded too, else ``name``; callbacks get both."""
    view = MetricView()
    for entry, value in values:
        if value is None:
            continue
        if entry.options.logger:
            view.log[entry.epoch_key] = value
        if entry.options.prog_bar:
            view.bar[entry.epoch_key] = value
        view.callback[entry.plain_key] = value
        view.callback[entry.epoch_key] = value
    return view


def as_tensors(metrics: Mapping[str, Scalar], device: torch.device) -> dict[str, Tensor]:
    """Host numbers become tensors on ``device``; no host read."""
    return {
        name: value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.get_default_dtype()).to(device, non_blocking=True)
        for name, value in metrics.items()
    }
