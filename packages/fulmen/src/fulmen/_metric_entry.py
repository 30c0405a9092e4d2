"""One logged metric: its options, its latest step value and its running total over the epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fulmen_fabric.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_protocols.collectives import ReduceOp

__all__ = ["FOLD_EVERY", "MetricEntry", "MetricObject", "MetricOptions", "Row", "Scalar"]

Scalar = Tensor | float

FOLD_EVERY = 64
"""Values kept by reference before they are added up with one stack: at most so many small tensors stay alive."""

_LEARNING_CALLS = 3
"""Values that are copied while it is found out whether the user changes the logged tensor in place afterwards."""


class MetricObject(Protocol):
    """What is used of a ``torchmetrics.Metric``."""

    def compute(self) -> Any:
        """The value over everything seen since ``reset``; synchronises over ranks by itself."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...


class MetricOptions(NamedTuple):
    """What ``self.log`` was asked to do with a metric, every default resolved."""

    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    op: ReduceOp
    sync: bool
    add_dataloader_idx: bool
    metric_attribute: str | None
    rank_zero_only: bool

    def difference(self, asked: MetricOptions) -> str:
        """In which options ``asked`` is not the same, in words."""
        pairs = zip(self._fields, self, asked, strict=True)
        return ", ".join(f"{field} was {old!r}, now {new!r}" for field, old, new in pairs if old != new)


class Row(NamedTuple):
    """A metric's identity and options, as ranks tell each other. ``dataloader_idx`` is -1 without a suffix."""

    hook: str
    name: str
    dataloader_idx: int
    options: MetricOptions

    @property
    def identity(self) -> tuple[str, str, int]:
        """What makes it the same metric on two ranks."""
        return self[:3]


class MetricEntry:
    """The record of one metric in one hook (and one dataloader).

    Tensors are kept by reference while that is safe: see ``record``. Totals are float64 (float32 on MPS, which has no
    float64), on the device of the values; numbers are added up on the host in double precision.
    """

    __slots__ = (
        "device_total",
        "dtype",
        "epoch_key",
        "epoch_value",
        "group_ranks",
        "host_total",
        "is_fast",
        "last",
        "loaders",
        "lost",
        "metric",
        "on_epoch",
        "op",
        "options",
        "per_batch",
        "plain_key",
        "provisional",
        "reduced_weight",
        "row",
        "step_key",
        "synced_from",
        "taken",
        "values",
        "watched",
        "weight",
        "weighted",
        "weights",
    )

    def __init__(
        self, row: Row, *, per_batch: bool, group_ranks: tuple[int, ...] | None = None, clone_always: bool = False
    ) -> None:
        options = row.options
        self.row = row
        self.options = options
        self.op: ReduceOp = options.op
        self.on_epoch = options.on_epoch
        self.per_batch = per_batch
        self.weighted = options.op == "mean" and options.on_epoch
        self.group_ranks = group_ranks
        forked = options.on_step and options.on_epoch
        suffix = f"/dataloader_idx_{row.dataloader_idx}" if row.dataloader_idx >= 0 else ""
        self.plain_key = row.name + suffix
        self.step_key = f"{row.name}_step{suffix}" if forked else self.plain_key
        self.epoch_key = f"{row.name}_epoch{suffix}" if forked else self.plain_key
        self.loaders: set[int] = set()  # that it was logged for, where its name does not say it
        self.metric: MetricObject | None = None
        self.provisional = False
        self.is_fast = False
        # Calls that still copy; math.inf: every call does.
        self.taken: float = -math.inf if clone_always else 0
        self.watched: tuple[Tensor, int] | None = None
        self.dtype: torch.dtype | None = None
        self.last: Scalar | None = None
        self.synced_from: Scalar | None = None
        self.lost = False
        self.values: list[Tensor] = []
        self.weights: list[float] = []
        self._clear()

    def _clear(self) -> None:
        self.values.clear()
        self.weights.clear()
        self.device_total: Tensor | None = None
        self.host_total: float | None = None
        self.weight: float = 0
        self.reduced_weight: float = -1
        self.epoch_value: Scalar | None = None

    def reset(self) -> None:
        """Forget all values; what was learned about the user's tensors is kept."""
        self._clear()
        self.last = None
        self.synced_from = None
        if self.metric is not None:
            self.metric.reset()

    # Taking values -----------------------------------------------------------------------------------------------

    def prepare(self, value: Tensor) -> Tensor:
        """A detached float tensor of shape ``()`` that no later in-place change can reach.

        The first calls copy, and watch whether the original is changed in place before the next call (``loss += aux``
        after ``log``; a buffer that counts). If it never is, later fresh tensors are kept by reference (``is_fast``),
        which saves a kernel for every metric and step. Views, tensors that were already changed in place, and
        inference tensors (whose changes leave no trace) are always copied.
        """
        if value.numel() != 1:
            raise ValueError(
                f"self.log({self.row.name!r}, ...) got a tensor of shape {tuple(value.shape)}: log one element, "
                "for example its mean()."
            )
        value = _local(value, self.row.name).detach()
        if value.ndim:
            value = value.reshape(())
        if not value.is_floating_point():
            if value.is_complex():
                raise ValueError(f"self.log({self.row.name!r}, ...) got a complex tensor: log its real part or abs().")
            if self.dtype is None:
                rank_zero_warn(
                    f"self.log({self.row.name!r}, ...) got {value.dtype}; it is converted to "
                    f"{torch.get_default_dtype()} to be reduced."
                )
            self.dtype = self.dtype or torch.get_default_dtype()
            return value.to(self.dtype)
        if self.dtype is None:
            self.dtype = value.dtype
        elif value.dtype is not self.dtype:
            self._widen(value.dtype)
            if value.dtype is not self.dtype:
                return value.to(self.dtype)
        self._learn(value)
        return value.clone()

    def _learn(self, value: Tensor) -> None:
        if self.taken < 0:
            return
        if value.is_inference():
            self.is_fast = False
            return
        watched, self.watched = self.watched, (value, value._version)
        if watched is not None and watched[0]._version != watched[1]:
            self.always_copy()
            return
        self.taken += 1
        if self.taken > _LEARNING_CALLS:
            self.is_fast = True
            self.watched = None

    def always_copy(self) -> None:
        """Never again keep a value by reference."""
        self.taken = -math.inf
        self.is_fast = False
        self.watched = None

    def _widen(self, dtype: torch.dtype) -> None:
        """Values of two dtypes came: keep them in one that holds both."""
        common = torch.promote_types(self.dtype or dtype, dtype)
        if common is not self.dtype:
            self.fold()
            self.dtype = common

    def add_number(self, value: float, weight: float) -> None:
        """Take a host number into the epoch's total."""
        total = self.host_total
        if self.op == "mean":
            self.host_total = value * weight + (total or 0.0)
            self.weight += weight
            return
        self.weight += 1
        self.host_total = value if total is None else combine_numbers((total, value), self.op)

    # Adding up ---------------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Add the kept values to the device total; no host read."""
        values, weights = self.values, self.weights
        if not values:
            return
        self.values, self.weights = [], []
        # Totals outlive the evaluation's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if self.is_fast and any(was_changed(value) for value in values):
                values, weights = self._drop_changed(values, weights)
                if not values:
                    return
            if len({value.device for value in values}) > 1:
                values = [value.to(values[-1].device, non_blocking=True) for value in values]
            stacked = torch.stack(values)
            wide = torch.float32 if stacked.device.type == "mps" else torch.float64
            if self.op == "mean":
                self.weight += sum(weights)
                if weights.count(weights[0]) == len(weights):
                    new = stacked.sum(dtype=wide) * weights[0]
                else:
                    on_device = torch.tensor(weights, dtype=wide).to(stacked.device, non_blocking=True)
                    new = stacked.to(wide).dot(on_device)
            else:
                self.weight += len(values)
                new = stacked.sum(dtype=wide) if self.op == "sum" else combine(stacked, self.op).to(wide)
            total = self.device_total
            self.device_total = new if total is None else combine_two(total, new, self.op)

    def _drop_changed(self, values: list[Tensor], weights: list[float]) -> tuple[list[Tensor], list[float]]:
        keep = [index for index, value in enumerate(values) if not was_changed(value)]
        self.note_loss()
        return [values[index] for index in keep], [weights[index] for index in keep] if weights else weights

    def note_loss(self) -> None:
        """Say once that a value was overwritten before it could be read, and copy from now on."""
        self.always_copy()
        if not self.lost:
            self.lost = True
            rank_zero_warn(
                f"a tensor logged as {self.row.name!r} was changed in place after self.log had taken it, which it had "
                "not been before; its value is left out of the record. Later values are copied. Log a clone() to "
                "keep them all."
            )

    def total(self) -> Scalar | None:
        """The epoch's total on this rank (mean: the weighted sum); None when nothing was logged."""
        self.fold()
        host, device = self.host_total, self.device_total
        if host is None or device is None:
            return device if host is None else host
        with torch.inference_mode(False), torch.no_grad():
            return combine_two(device, torch.tensor(host, dtype=device.dtype), self.op)

    def local_value(self) -> Scalar | None:
        """The epoch's value over this rank's batches; None when nothing was logged. No communication, no host read."""
        total = self.total()
        if total is None:
            return None
        divisor = 1.0 if self.op != "mean" else (self.weight or math.nan)
        if isinstance(total, Tensor):
            with torch.inference_mode(False), torch.no_grad():
                return (total / divisor).to(self.result_dtype)
        return total / divisor

    @property
    def result_dtype(self) -> torch.dtype:
        """float64 for float64 values, else float32."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def step_value(self) -> Scalar | None:
        """The latest value, unless it was overwritten."""
        last = self.last
        if self.is_fast and isinstance(last, Tensor) and was_changed(last):
            self.note_loss()
            self.last = last = None
        return last


def was_changed(record: Tensor) -> bool:
    """Whether a tensor kept by reference was written to: records have version 0 when they are taken."""
    return not record.is_inference() and record._version != 0


def combine(values: Tensor, op: ReduceOp) -> Tensor:
    """Reduce ``values`` over dimension 0. NaN wins, in ``min`` and ``max`` too."""
    if op == "min":
        return values.amin(0)
    if op == "max":
        return values.amax(0)
    return values.sum(0)


def combine_two(left: Tensor, right: Tensor, op: ReduceOp) -> Tensor:
    """Totals of two parts of an epoch as one; a mean's totals are sums."""
    if op == "min":
        return torch.minimum(left, right.to(left.device, non_blocking=True))
    if op == "max":
        return torch.maximum(left, right.to(left.device, non_blocking=True))
    return left + right


def combine_numbers(values: Sequence[float], op: ReduceOp) -> float:
    """``combine`` for host numbers: sums for ``mean`` and ``sum``; NaN wins."""
    if op in ("mean", "sum"):
        return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    if any(value != value for value in values):
        return math.nan
    return min(values) if op == "min" else max(values)


def _local(value: Tensor, name: str) -> Tensor:
    """This rank's copy of a replicated DTensor; other tensors as they are."""
    placements: Any = getattr(value, "placements", None)
    if placements is None:
        return value
    if not all(placement.is_replicate() for placement in placements):
        raise ValueError(
            f"self.log({name!r}, ...) got a DTensor placed as {placements!r}; reading it would communicate. "
            "Log value.full_tensor(), on every rank."
        )
    replicated: Any = value
    result: Tensor = replicated.to_local()
    return result
