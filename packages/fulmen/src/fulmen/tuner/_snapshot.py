"""What a trial changes and must give back: weights, optimizers, scaler, gradients, and the module's own plain data."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from fulmen.hparams import AttributeDict
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsGradScaling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fulmen_protocols import Precision

__all__ = ["Snapshot"]

_LEFT_ALONE = frozenset(vars(nn.Module())) - {"training"} | {
    "_trainer",
    "_fabric",
    "_metric_store",
    "_target_device",
    "_requires_grad_before",
}
"""What torch and the run keep in a module's ``__dict__``; parameters and buffers have their own place here."""

_PLAIN = (int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, tuple, set, dict, OrderedDict, defaultdict, deque, AttributeDict)


class _Kept(NamedTuple):
    """A tensor's values, on the CPU so that no memory of the device is taken, and where they belong."""

    values: Tensor
    device: torch.device


class Snapshot:
    """The state of a module and its optimizers, kept in this process's memory.

    ``restore`` may be called any number of times. Weights come back in place, bit for bit, sharded ones as the shard of
    this rank. So do attributes of the module and its submodules that are plain data: numbers, strings, tensors (the
    state of metrics) and containers of those; attributes that came since are removed.

    Args:
        module: what is trained.
        optimizers: what trains it.
        precision: its scaler's state is kept.
        trains: whether the trial trains; without gradients no parameter and no optimizer changes.
    """

    def __init__(
        self, module: nn.Module, optimizers: Iterable[Optimizer], precision: Precision, *, trains: bool
    ) -> None:
        self._module, self._precision = module, precision
        with torch.inference_mode(False), torch.no_grad():
            parameters = [p for p in module.parameters() if not _is_lazy(p)] if trains else []
            self._tensors = [(tensor, _kept(tensor)) for tensor in (*parameters, *_buffers(module))]
            self._gradients = [(p, p.requires_grad, None if p.grad is None else _kept(p.grad)) for p in parameters]
            self._optimizers = [_OptimizerState(optimizer) for optimizer in optimizers] if trains else []
            self._plain = list(_plain_attributes(module))
            self._extra = [
                (each, copy.deepcopy(each.get_extra_state()))
                for each in module.modules()
                if type(each).get_extra_state is not nn.Module.get_extra_state
            ]
        self._names = {each: set(vars(each)) for each in module.modules()}
        self._scaler = (
            copy.deepcopy(dict(precision.state_dict())) if trains and supports(precision, SupportsGradScaling) else None
        )

    def restore(self) -> None:
        """Make everything as it was."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor, kept in self._tensors:
                _local(tensor).copy_(kept.values)
            for parameter, requires_grad, gradient in self._gradients:
                parameter.requires_grad_(requires_grad)
                if gradient is None:
                    parameter.grad = None
                elif parameter.grad is not None:
                    _local(parameter.grad).copy_(gradient.values)
                elif not hasattr(parameter, "to_local"):
                    parameter.grad = gradient.values.to(gradient.device, copy=True)
            for optimizer in self._optimizers:
                optimizer.restore()
            for each, state in self._extra:
                each.set_extra_state(copy.deepcopy(state))
            for each in self._module.modules():
                known = self._names.get(each)
                if known is None:
                    continue
                for name in vars(each).keys() - known - _LEFT_ALONE:
                    if _is_plain(vars(each)[name]):
                        del vars(each)[name]
            for each, name, original, kept_value in self._plain:
                vars(each)[name] = _put_back(original, _thawed(kept_value, {}))
        if self._scaler is not None and supports(self._precision, SupportsGradScaling):
            self._precision.load_state_dict(copy.deepcopy(self._scaler))


class _OptimizerState:
    """An optimizer's state and groups. ``load_state_dict`` would cast the state to the parameters' dtype."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._inner: list[_OptimizerState] = []
        self._state_dict: Any = None
        memo: dict[int, _Kept] = {}
        if not isinstance(optimizer, Optimizer):
            self._state_dict = _frozen(optimizer.state_dict(), memo)
            return
        self._inner = [_OptimizerState(each) for each in vars(optimizer).values() if isinstance(each, Optimizer)]
        self._groups = [
            {name: _frozen(value, memo) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._state = [(parameter, _frozen(state, memo)) for parameter, state in optimizer.state.items()]

    def restore(self) -> None:
        optimizer: Any = self._optimizer
        memo: dict[int, Tensor] = {}
        if self._state_dict is not None:
            optimizer.load_state_dict(_thawed(self._state_dict, memo))
            return
        for inner in self._inner:
            inner.restore()
        for group, kept in zip(optimizer.param_groups, self._groups, strict=True):
            for name in set(group) - set(kept) - {"params"}:
                del group[name]
            group.update({name: _thawed(value, memo) for name, value in kept.items()})
        optimizer.state.clear()
        optimizer.state.update({parameter: _thawed(state, memo) for parameter, state in self._state})


def _buffers(module: nn.Module) -> Iterator[Tensor]:
    return (buffer for buffer in module.buffers() if not _is_lazy(buffer))  # those that no checkpoint holds, too


def _is_lazy(tensor: object) -> bool:
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))  # it has no values yet


def _local(tensor: Tensor) -> Tensor:
    detached: Any = tensor.detach()
    return cast("Tensor", detached.to_local()) if hasattr(detached, "to_local") else detached


def _kept(tensor: Tensor) -> _Kept:
    return _Kept(_local(tensor).to("cpu", copy=True), tensor.device)


def _plain_attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str, object, object]]:
    memo: dict[int, _Kept] = {}
    for each in module.modules():
        for name, value in vars(each).items():
            if name not in _LEFT_ALONE and _is_plain(value):
                yield each, name, value, _frozen(value, memo)


def _is_plain(value: object) -> bool:
    if isinstance(value, (*_PLAIN, Tensor)):
        return True
    if type(value) not in _CONTAINERS:
        return False
    if isinstance(value, dict):
        items = cast("dict[object, object]", value)
        return all(_is_plain(key) and _is_plain(item) for key, item in items.items())
    return all(_is_plain(item) for item in cast("Iterable[object]", value))


def _frozen(value: Any, memo: dict[int, _Kept]) -> Any:
    """A copy in which every tensor is a ``_Kept``, the same one where it is the same tensor."""
    if isinstance(value, Tensor):
        kept = memo.get(id(value))
        if kept is None:
            kept = memo[id(value)] = _kept(value)
        return kept
    if type(value) in (dict, OrderedDict, defaultdict, AttributeDict):
        return _rebuilt(value, {key: _frozen(item, memo) for key, item in value.items()})
    if type(value) in (list, tuple, set, deque):
        return _rebuilt(value, [_frozen(item, memo) for item in value])
    return copy.deepcopy(value)


def _thawed(value: Any, memo: dict[int, Tensor]) -> Any:
    """Undo ``_frozen``, each time with new tensors."""
    if isinstance(value, _Kept):
        tensor = memo.get(id(value))
        if tensor is None:
            tensor = memo[id(value)] = value.values.to(value.device, copy=True)
        return tensor
    if type(value) in (dict, OrderedDict, defaultdict, AttributeDict):
        return _rebuilt(value, {key: _thawed(item, memo) for key, item in value.items()})
    if type(value) in (list, tuple, set, deque):
        return _rebuilt(value, [_thawed(item, memo) for item in value])
    return copy.deepcopy(value)


def _rebuilt(like: Any, content: Any) -> Any:
    if isinstance(like, defaultdict):
        return defaultdict(cast("Any", like).default_factory, content)
    if isinstance(like, deque):
        return deque(content, cast("Any", like).maxlen)
    return type(like)(content)


def _put_back(original: Any, value: Any) -> Any:
    """``value``, in the very container that held it: somebody may have kept a reference."""
    if isinstance(original, dict):
        original.clear()
        original.update(value)
    elif isinstance(original, list):
        original[:] = value
    elif isinstance(original, set):
        original.clear()
        original.update(value)
    elif isinstance(original, deque):
        original.clear()
        original.extend(value)
    else:
        return value
    return cast("object", original)
