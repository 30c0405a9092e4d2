"""Snapshot: the state of a fit between two batches, held in memory, taken and given back by what checkpoints use."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from fulmen import _checkpointing
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsGradScaling

if TYPE_CHECKING:
    from fulmen._session import Session
    from fulmen.progress import Progress
    from fulmen.trainer import Trainer

__all__ = ["FollowsWeights", "Snapshot", "structure"]

Place = Literal["host", "device"]


@runtime_checkable
class FollowsWeights(Protocol):
    """A callback with tensors that follow the weights from step to step, such as an average of them."""

    def weights_state(self) -> Mapping[str, Any]:
        """These tensors, as they are or copied; called between two batches."""
        ...

    def load_weights_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``weights_state`` gave."""
        ...


class Snapshot:
    """What optimizer steps change, as this rank holds it: module, optimizers, schedulers, scaler, averages of weights.

    Not the counters, the place in the data, and the random state. Parts of sharded tensors stay parts.

    Args:
        trainer: whose fit it is, between two batches. Every rank takes one at the same place.
        session: the running fit.
        progress: its counters.
        place: where the copies lie. On the host they are made by the CUDA device on its own time: nothing waits for it.
    """

    def __init__(self, trainer: Trainer, session: Session, progress: Progress, place: Place) -> None:
        module = _checkpointing.module_state(session, full=False)
        precision = trainer.assembly.precision
        copies = _Copies(place)
        self.structure = structure(session)
        """What a fit must still be made of for this to be loaded."""
        self._layer_versions = getattr(module, "_metadata", None)
        self._module = copies.of(module)
        self._optimizers = [
            copies.of(_checkpointing.optimizer_state(session, optimizer, full=False))
            for optimizer in session.optimizers
        ]
        self._schedulers = [copy.deepcopy(config.scheduler.state_dict()) for config in session.schedulers]
        self._scaler = dict(precision.state_dict()) if supports(precision, SupportsGradScaling) else None
        self._callbacks = [(one, copies.of(one.weights_state())) for one in _following(trainer)]
        self._scheduled_epochs = _scheduled_epochs(progress)

    def restore(self, trainer: Trainer, session: Session, progress: Progress) -> None:
        """Go back. Every rank must call it, between two batches; open gradients of manual optimization are dropped."""
        module: OrderedDict[str, Any] = OrderedDict(_given(self._module))
        if self._layer_versions is not None:
            cast("Any", module)._metadata = self._layer_versions
        _checkpointing.load_module_state(session, module, strict=session.module.strict_loading)
        for optimizer, state in zip(session.optimizers, self._optimizers, strict=True):
            _checkpointing.load_optimizer_state(session, optimizer, _given(state))
            if not session.module.automatic_optimization:
                optimizer.zero_grad()
        for config, state in zip(session.schedulers, self._schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        self._repeat_epochs(session, progress)
        precision = trainer.assembly.precision
        if self._scaler is not None and supports(precision, SupportsGradScaling):
            precision.load_state_dict(self._scaler)
        for callback, state in self._callbacks:
            callback.load_weights_state(_given(state))

    def _repeat_epochs(self, session: Session, progress: Progress) -> None:
        """Step schedules that count epochs once for each that has ended since: the epochs do not go back."""
        if not session.module.automatic_optimization:
            return
        for epoch in range(self._scheduled_epochs, _scheduled_epochs(progress)):
            for config in session.schedulers:
                by_epoch = config.interval == "epoch" and not config.reduce_on_plateau
                if by_epoch and (epoch + 1) % config.frequency == 0:
                    session.module.lr_scheduler_step(config.scheduler, None)


def structure(session: Session) -> tuple[object, ...]:
    """What the state of a fit is made of. Callbacks change it: layers thaw, are pruned, a schedule is replaced."""
    groups = tuple(tuple(len(group["params"]) for group in one.param_groups) for one in session.optimizers)
    schedulers = tuple(id(config.scheduler) for config in session.schedulers)
    return tuple(session.module.state_dict(keep_vars=True)), groups, schedulers


def _following(trainer: Trainer) -> list[FollowsWeights]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FollowsWeights)]


def _scheduled_epochs(progress: Progress) -> int:
    """For how many epochs the schedules that count them have been stepped."""
    return progress.epoch + int(progress.epoch_is_whole)


class _Kept:
    """A copy of one tensor, of which any number of fresh ones can be had."""

    __slots__ = ("_copy", "_device", "_whole")

    def __init__(self, tensor: Tensor, place: Place) -> None:
        tensor = tensor.detach()
        self._whole: Callable[[Tensor], Tensor] | None = None
        sharded: Any = sys.modules.get("torch.distributed.tensor")
        if sharded is not None and isinstance(tensor, sharded.DTensor):
            part: Any = tensor
            self._whole = partial(
                sharded.DTensor.from_local,
                device_mesh=part.device_mesh,
                placements=part.placements,
                run_check=False,
                shape=part.shape,
                stride=part.stride(),
            )
            tensor = cast("Tensor", part.to_local())
        self._device = tensor.device
        if place == "device" or tensor.device.type != "cuda" or not _is_plain(tensor):
            self._copy = tensor.clone()
        else:
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)

    def give(self) -> Tensor:
        """A fresh copy, where the tensor was. It is made by the queue that made this one, so after it."""
        fresh = self._copy.to(self._device, non_blocking=True, copy=True)
        return fresh if self._whole is None else self._whole(fresh)


class _Copies:
    """Copies of trees of tensors and plain data; of tensors that are one and the same there is one."""

    def __init__(self, place: Place) -> None:
        self._place: Place = place
        self._known: dict[object, _Kept] = {}

    def of(self, tree: object) -> Any:
        """``tree`` with a ``_Kept`` in place of each tensor."""
        if isinstance(tree, Tensor):
            return self._kept(tree)
        if isinstance(tree, Mapping):
            return {key: self.of(value) for key, value in cast("Mapping[object, object]", tree).items()}
        if type(tree) in (list, tuple):
            items = cast("list[object]", tree)
            return type(items)(self.of(value) for value in items)
        return copy.deepcopy(tree)

    def _kept(self, tensor: Tensor) -> _Kept:
        if not _is_plain(tensor) or tensor.numel() == 0:
            return _Kept(tensor, self._place)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._known:  # tied weights have several names
            self._known[key] = _Kept(tensor, self._place)
        return self._known[key]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor.detach()) is Tensor and tensor.layout is torch.strided


def _given(tree: object) -> Any:
    """The tree of which ``_Copies.of`` was asked, with fresh tensors."""
    if isinstance(tree, _Kept):
        return tree.give()
    if isinstance(tree, dict):
        return {key: _given(value) for key, value in cast("dict[object, object]", tree).items()}
    if type(tree) in (list, tuple):
        items = cast("list[object]", tree)
        return type(items)(_given(value) for value in items)
    return copy.deepcopy(tree)
