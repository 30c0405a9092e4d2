"""MetricStore: what ``self.log`` feeds. Values stay on the device and on the rank until a declared point."""

from __future__ import annotations

from numbers import Number
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fulmen._metric_agreement import ByDevices
from fulmen._metric_batch import batch_sizes, first_batch_size
from fulmen._metric_entry import FOLD_EVERY, MetricEntry, MetricObject, Row, Scalar
from fulmen._metric_options import LogCall, group_ranks_of, is_metric, read_call, warn_about_ranks
from fulmen._metric_reduce import computed, only_tensor, reduce_epoch_values, reduce_step_values
from fulmen._metric_scope import LogScope, scope_for
from fulmen._metric_state import load_entries, save_entries
from fulmen._metric_sync import Schema
from fulmen._metric_view import MetricView, as_tensors, epoch_view, step_view
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed import ProcessGroup

    from fulmen._metric_agreement import Agreement
    from fulmen_protocols.collectives import Collectives

__all__ = ["LogScope", "MetricStore", "MetricView", "Scalar", "scope_for"]

_AGREE_EVERY = 64
"""Batches after which ranks that reduce step values look for metrics they have not agreed on."""


class MetricStore:
    """The metrics of one stage of a run.

    ``log`` never communicates and never waits for the device. Two declared points do: ``reduce_epoch``, and
    ``pending_sync`` for step values logged with ``sync_dist=True``.

    Args:
        device: where the model is; the messages between ranks live there.
        collectives: all ranks of the run.
        stage: ``"train"``, ``"validate"``, ``"test"`` or ``"sanity_check"``.
        data_parts: by rank, which part of the data it reads; None where every rank reads its own. Ranks that read the
            same count once.
        data_group: the ranks among which the data are split, for metric objects; None: all.
        agreement: how ranks find out that one has a new step value to reduce; None: by their devices.

    Attributes:
        scope: the hook that is running, set by the loop around each hook; None outside of hooks.
        clone_values: copy every logged tensor at once. Needed where a tensor's memory is reused without autograd
            noticing, as the outputs of replayed CUDA graphs (``mode="reduce-overhead"``) are.
        may_sync_steps: whether the loop must call ``pending_sync`` after each batch; False on one rank.
    """

    __slots__ = (
        "_agreement",
        "_at_epoch",
        "_batch",
        "_batches",
        "_cache",
        "_checked_batch",
        "_collectives",
        "_data_group",
        "_dataloader_idx",
        "_device",
        "_entries",
        "_epoch_schema",
        "_flushes",
        "_size",
        "_step_schema",
        "_training",
        "_world_size",
        "clone_values",
        "may_sync_steps",
        "scope",
        "stage",
    )

    def __init__(
        self,
        *,
        device: torch.device,
        collectives: Collectives,
        stage: str,
        data_parts: tuple[int, ...] | None = None,
        data_group: ProcessGroup | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        if stage not in ("train", "validate", "test", "sanity_check"):
            raise MisconfigurationException(
                f"stage={stage!r} has no metrics: use 'train', 'validate', 'test' or 'sanity_check'."
            )
        self.stage = stage
        self.scope: LogScope | None = None
        self.clone_values = False
        self._training = stage == "train"
        self._device = device
        self._collectives = collectives
        self._world_size = collectives.world_size
        self.may_sync_steps = self._training and self._world_size > 1
        self._cache: dict[tuple[object, ...], MetricEntry] = {}
        self._entries: dict[tuple[str, str, int], MetricEntry] = {}
        self._data_group = data_group
        self._epoch_schema = Schema(collectives, device, data_parts)
        self._step_schema = Schema(collectives, device, data_parts)
        self._agreement = ByDevices(self._step_schema.ask_devices) if agreement is None else agreement
        self._batch: object = None
        self._size: int | None = None
        self._dataloader_idx: int | None = None
        self._checked_batch = False
        self._at_epoch = False
        self._batches = 0
        self._flushes = 0

    @property
    def device(self) -> torch.device:
        """Where the values are wanted."""
        return self._device

    # The path of a batch -----------------------------------------------------------------------------------------

    def start_batch(self, batch: object, batch_idx: int = 0, dataloader_idx: int | None = None) -> object:
        """Remember the batch, whose size weighs what is logged from it; measured only when that is needed.

        Args:
            batch: kept by reference until the next call.
            batch_idx: not used yet by any rule; part of the loop's contract.
            dataloader_idx: None when there is one loader; otherwise names get ``/dataloader_idx_{i}``.
        """
        self._batch = batch
        self._size = None
        self._dataloader_idx = dataloader_idx
        self._at_epoch = False
        return batch

    def log(
        self,
        name: str,
        value: object,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: str | Callable[..., Any],
        sync_dist: bool,
        sync_dist_group: object,
        add_dataloader_idx: bool,
        batch_size: int | None,
        metric_attribute: str | None,
        rank_zero_only: bool,
        *,
        module: nn.Module | None,
    ) -> None:
        """Record one value from the running hook. No communication, no host read.

        Args:
            name: without the ``_step``/``_epoch`` and ``/dataloader_idx_i`` endings, which are added.
            value: a number, a tensor of one element, or a ``torchmetrics.Metric`` that ``module`` holds.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers; None means True.
            on_step: record the latest value; None: the hook's default.
            on_epoch: record the epoch's value, reduced by ``reduce_fx``; None: the hook's default.
            reduce_fx: ``"mean"`` (weighted by batch size), ``"sum"``, ``"min"``, ``"max"``, or torch's functions.
            sync_dist: reduce over ranks too. Step values: at ``pending_sync``; epoch values: at ``reduce_epoch``.
            sync_dist_group: the ``torch.distributed`` group to reduce within; None: all ranks.
            add_dataloader_idx: tell dataloaders apart by the name's ending.
            batch_size: the mean's weight; None: the first tensor's leading size in the batch.
            metric_attribute: the attribute of ``module`` that holds the metric object; None: searched once.
            rank_zero_only: the caller logs on rank 0 alone; nothing is synced.
            module: where metric objects are looked for.

        Raises:
            MisconfigurationException: the hook may not log, the options contradict each other, or the name was
                logged before in this hook with other options.
            ValueError: the value is none of the above.
        """
        key = (  # LogCall's fields in their order, as a plain tuple: nothing is called for it
            self.scope,
            self._dataloader_idx,
            name,
            prog_bar,
            logger,
            on_step,
            on_epoch,
            reduce_fx,
            sync_dist,
            sync_dist_group,
            add_dataloader_idx,
            metric_attribute,
            rank_zero_only,
        )
        entry = self._cache.get(key)
        if entry is None:
            entry = self._cache[key] = self._resolve(LogCall(*key), value, module)
        if type(value) is Tensor:
            if (
                entry.is_fast
                and value.dtype is entry.dtype
                and value.ndim == 0
                and not value.is_inference()
                and not value._version
                and not value._is_view()
            ):
                record = value.detach() if value.requires_grad else value
            else:
                record = entry.prepare(value)
            entry.last = record
            if entry.on_epoch:
                values = entry.values
                values.append(record)
                if entry.weighted:
                    if batch_size is None:
                        batch_size = (self._size or self._measure(name)) if entry.per_batch else 1
                    entry.weights.append(batch_size)
                if len(values) >= FOLD_EVERY:
                    entry.fold()
        elif type(value) is float:
            entry.last = value
            if entry.on_epoch:
                weight = 1 if not entry.weighted else self._weight(name, entry, batch_size)
                entry.add_number(value, weight)
        else:
            self._log_other(name, value, entry, batch_size)

    def _log_other(self, name: str, value: object, entry: MetricEntry, batch_size: int | None) -> None:
        """Tensor subclasses, other numbers and metric objects."""
        if isinstance(value, Tensor):
            entry.last = record = entry.prepare(value)
            if entry.on_epoch:
                entry.values.append(record)
                if entry.weighted:
                    entry.weights.append(self._weight(name, entry, batch_size))
        elif isinstance(value, Number) and not isinstance(value, complex):
            number = float(cast("Any", value))
            entry.last = number
            if entry.on_epoch:
                entry.add_number(number, self._weight(name, entry, batch_size) if entry.weighted else 1)
        elif is_metric(value):
            if entry.metric is not value:
                raise MisconfigurationException(
                    f"self.log({name!r}, ...) got another metric object than before: one name is one object."
                )
            entry.weight = 1
            if entry.options.on_step:
                step_value: object = getattr(value, "_forward_cache", None)
                entry.last = None if step_value is None else entry.prepare(only_tensor(name, step_value))
        else:
            raise ValueError(
                f"self.log({name!r}, ...) got a {type(value).__name__}: log a number, a tensor of one element or a "
                "torchmetrics.Metric; a mapping goes to self.log_dict."
            )

    def _weight(self, name: str, entry: MetricEntry, batch_size: int | None) -> float:
        if batch_size is not None:
            return batch_size
        return (self._size or self._measure(name)) if entry.per_batch else 1

    def _measure(self, name: str) -> int:
        """The size of the current batch, found once per batch."""
        size = first_batch_size(self._batch)
        if size is None:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) takes a mean over the epoch, and no batch size was found in a batch of type "
                f"{type(self._batch).__name__}: pass batch_size=... to self.log."
            )
        if not self._checked_batch:
            self._checked_batch = True
            if len(set(batch_sizes(self._batch))) > 1:
                rank_zero_warn(
                    f"self.log({name!r}, ...) takes a mean weighted by batch size; the batch's tensors differ in their "
                    f"leading size, and the first one's, {size}, was used. Pass batch_size=... to self.log."
                )
        self._size = size
        return size

    def _resolve(self, call: LogCall, value: object, module: nn.Module | None) -> MetricEntry:
        """Check a combination of hook, name and options once, and find or make its entry."""
        metric = cast("MetricObject", value) if is_metric(value) else None
        row, scope = read_call(call, metric, module)
        entry = self._entries.get(row.identity)
        if entry is None or (entry.provisional and entry.options != row.options):
            entry = self._entries[row.identity] = MetricEntry(
                row,
                per_batch=scope.per_batch,
                group_ranks=group_ranks_of(call.sync_dist_group, self._collectives.rank),
                clone_always=self.clone_values,
            )
            entry.metric = metric
            if self._world_size > 1 and metric is None:
                warn_about_ranks(row, self._world_size, training=self._training)
        elif entry.options != row.options:
            raise MisconfigurationException(
                f"self.log({row.name!r}, ...) is called twice in {row.hook} with different options: "
                f"{entry.options.difference(row.options)}. Use two names, or the same options."
            )
        elif entry.provisional:
            entry.provisional = False
            entry.metric = metric
            entry.group_ranks = group_ranks_of(call.sync_dist_group, self._collectives.rank)
        if call.dataloader_idx is not None and scope.per_batch and row.dataloader_idx < 0:
            entry.loaders.add(call.dataloader_idx)
        return entry

    # Declared points ---------------------------------------------------------------------------------------------

    def pending_sync(self, *, at_flush: bool = False) -> None:
        """Reduce over ranks the step values logged with ``sync_dist=True``. Call after each batch, on every rank.

        Ranks agree which metrics that concerns after the first batch of an epoch, at the first flush and, while there
        are some, at every flush and every 64th batch: those calls wait for the other ranks' hosts. While there are
        none, a rank that has one asks the others to look at their next flush, and nobody waits. A batch in between
        costs one asynchronous collective while metrics are agreed on, and nothing while there are none. A metric that
        first appears between two agreements is this rank's own until the next one.

        Args:
            at_flush: the loggers get a row after this batch; the same on every rank.
        """
        if not self.may_sync_steps:
            return
        self._batches += 1
        self._flushes += at_flush
        schema, agreement = self._step_schema, self._agreement
        ask: Callable[[bool], bool] | None = None
        if self._batches == 1 or (at_flush and (self._flushes == 1 or schema.rows)):
            ask = agreement.any
        elif at_flush:
            ask = agreement.at_row
        elif schema.rows and self._batches % _AGREE_EVERY == 0:
            ask = agreement.any
        if ask is not None or schema.rows:
            reduce_step_values(schema, self._entries, self._adopt, ask=ask, device=self._device)

    def reduce_epoch(self) -> None:
        """Compute the epoch's values; over all ranks where asked for.

        Call on every rank, before the epoch-end hooks and again after them, for what they logged.
        On several ranks: one collective of a shape that all ranks know, one host read, and more only when a rank
        logged a metric that the ranks have not agreed on yet. Ranks may log different metrics, or none.
        """
        self._at_epoch = True
        if self._world_size > 1:
            reduce_epoch_values(self._epoch_schema, self._entries, self._adopt, self._data_group)
        for entry in self._entries.values():
            if entry.on_epoch:
                self._epoch_value(entry)

    def _adopt(self, row: Row) -> MetricEntry:
        """An entry for a metric that so far only other ranks log."""
        entry = self._entries.get(row.identity)
        if entry is None:
            entry = MetricEntry(row, per_batch=scope_for(row.hook).per_batch)
            entry.provisional = True
            self._entries[row.identity] = entry
        return entry

    def _epoch_value(self, entry: MetricEntry) -> Scalar | None:
        """What is known of the epoch's value without communicating."""
        if entry.metric is not None:
            if self._world_size == 1 and entry.weight:
                entry.epoch_value = computed(entry)
            return entry.epoch_value
        if self._world_size > 1 and entry.options.sync:
            return entry.epoch_value
        if entry.values or entry.weight != entry.reduced_weight:
            entry.epoch_value = entry.local_value()
            entry.reduced_weight = entry.weight
        return entry.epoch_value

    def reset(self) -> None:
        """Forget all values and reset the metric objects; entries stay, checked as they are."""
        for entry in self._entries.values():
            entry.reset()
        self.let_go()
        self._size = None
        self._dataloader_idx = None
        self._at_epoch = False
        self._batches = 0

    def let_go(self) -> None:
        """Do not keep the last batch alive: at the end of a run."""
        self._batch = None

    # Reading -----------------------------------------------------------------------------------------------------

    def step_metrics(self, dataloader_idx: int | None = None) -> MetricView:
        """The latest step values. In evaluation the callback view is empty: callbacks get epoch values there.

        Args:
            dataloader_idx: only this loader's metrics and those of no loader; None: all.
        """
        return step_view(self._of_loader(dataloader_idx), with_callback=self._training)

    def epoch_metrics(self, dataloader_idx: int | None = None) -> MetricView:
        """The epoch's values that are known without communicating.

        Args:
            dataloader_idx: only this loader's metrics and those of no loader; None: all.
        """
        entries = self._of_loader(dataloader_idx)
        return epoch_view((entry, self._epoch_value(entry)) for entry in entries if entry.on_epoch)

    def _of_loader(self, dataloader_idx: int | None) -> Iterable[MetricEntry]:
        entries = self._entries.values()
        if dataloader_idx is None:
            return entries
        return (
            entry
            for entry in entries
            if entry.row.dataloader_idx == dataloader_idx
            or (entry.row.dataloader_idx < 0 and (not entry.loaders or dataloader_idx in entry.loaders))
        )

    def metrics(self) -> MetricView:
        """Step values while batches run; epoch values from ``reduce_epoch`` until the next batch."""
        return self.epoch_metrics() if self._at_epoch else self.step_metrics()

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """What callbacks monitor now, as tensors on the store's device."""
        return as_tensors(self.metrics().callback, self._device)

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """What loggers get now, as tensors on the store's device."""
        return as_tensors(self.metrics().log, self._device)

    @property
    def progress_bar_metrics(self) -> dict[str, Scalar]:
        """What the progress bar shows now: the last step's values, and the epoch's once it is over. Unread."""
        step = self.step_metrics().bar
        return {**step, **self.epoch_metrics().bar} if self._at_epoch else step

    # Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The running epoch on this rank, as plain data: totals, weights, latest values, metric objects' states."""
        return save_entries(self.stage, self._entries.values())

    def load_state_dict(self, state_dict: dict[str, Any], *, module: nn.Module | None = None) -> None:
        """Go on in the middle of an epoch.

        Args:
            state_dict: from ``state_dict`` of the same rank.
            module: holds the metric objects, under the attributes that they were saved from.
        """
        for entry in load_entries(self.stage, state_dict, module, self._device):
            self._entries[entry.row.identity] = entry
