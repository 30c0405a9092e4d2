"""Modules that were created on the meta device get memory and the values that creating them here would have given."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fulmen_strategies._sharded.layout import laid_out_like, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fulmen_strategies.collectives import TorchCollectives

__all__ = ["is_on_meta", "materialise"]


def is_on_meta(module: nn.Module) -> bool:
    """Whether any parameter or buffer of ``module`` has no memory yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def materialise(module: nn.Module, device: torch.device, collectives: TorchCollectives) -> None:
    """Give every meta tensor of ``module`` memory on ``device``, in place, and its first value.

    Layer by layer, in the order in which their constructors ran, ``reset_parameters`` draws whole tensors on ``device``
    from this moment's random state; rank 0's count, and of a DTensor each rank keeps its shard. A module with a method
    ``_init_weights(layer)``, as models of Transformers and timm have it, then gives its layers the values that its own
    constructor would have given them. So with one seed the values are those of one process that creates the module on
    ``device``, for layers that draw as their constructors do (those of torch), and never more than one layer is whole
    in memory.

    What nothing gives a value is NaN (of integers an extreme one), with a warning: a checkpoint may fill it.

    Args:
        module: sharded already, or not. Tied parameters stay tied.
        device: of this rank.
        collectives: among the ranks that share the module.
    """
    filling = _Filling(module, device, collectives)
    for layer in _constructed(module):
        filling.draw(layer)
        rule = _rule(layer)
        if rule is not None:
            filling.apply(rule, layer)
    filling.finish()


class _Filling:
    """The meta tensors of a module on their way to values.

    Args:
        module: whose they are.
        device: where the values are to be.
        collectives: among the ranks that share the module.
    """

    def __init__(self, module: nn.Module, device: torch.device, collectives: TorchCollectives) -> None:
        self._device, self._collectives = device, collectives
        self._meta = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_meta}
        self._made: dict[int, Tensor] = {}  # by the identity of the meta tensor, so that tied ones stay tied
        self._names: dict[int, dict[str, int]] = {}  # of a layer's meta tensors, by the identity of the layer
        self._ruled: set[int] = set()
        self._unset: dict[int, nn.Module] = {}

    def draw(self, layer: nn.Module) -> None:
        """The values that the layer's own constructor draws."""
        own = {name: tensor for name, tensor in _own_tensors(layer) if id(tensor) in self._meta}
        if not own:
            return
        self._names[id(layer)] = {name: id(tensor) for name, tensor in own.items()}
        _put(layer, {name: _whole_like(tensor, self._device) for name, tensor in own.items()})
        reset = _initialiser(layer)
        if reset is None:
            self._unset[id(layer)] = layer
        else:
            reset()
        self._take(layer, set(self._made))

    def apply(self, rule: Callable[[nn.Module], object], around: nn.Module) -> None:
        """The values that ``rule`` gives the layers of ``around``, but for those to which another has come before."""
        known = {key for layer in self._ruled for key in self._names[layer].values()}
        for layer in _constructed(around):
            if id(layer) not in self._names or id(layer) in self._ruled:
                continue
            self._ruled.add(id(layer))
            own = dict(_own_tensors(layer))
            values = {name: whole(own[name].detach()).to(self._device).clone() for name in self._names[id(layer)]}
            like = {name: nn.Parameter(v, own[name].requires_grad) if isinstance(own[name], nn.Parameter) else v
                    for name, v in values.items()}  # fmt: skip
            _put(layer, like)
            rule(layer)
            self._take(layer, known)
            known.update(self._names[id(layer)].values())

    def _take(self, layer: nn.Module, known: set[int]) -> None:
        """Rank 0's whole values, of which each rank keeps its part; what is ``known`` keeps the values that it has."""
        drawn = dict(_own_tensors(layer))
        for name, key in self._names[id(layer)].items():
            if key not in known:
                full = drawn[name].detach()
                self._collectives.broadcast(full)
                self._made[key] = _as_before(full, self._meta[key], self._device)
        _put(layer, {name: self._made[key] for name, key in self._names[id(layer)].items()})

    def finish(self) -> None:
        """Name the layers of which some tensor has no value."""
        silent = {
            type(layer).__name__
            for layer in self._unset.values()
            for name, tensor in _own_tensors(layer)
            if name in self._names[id(layer)] and _is_unset(whole(tensor.detach()))
        }
        if silent and self._collectives.rank == 0:
            warnings.warn(
                f"{', '.join(sorted(silent))} held tensors on the meta device and has no reset_parameters(): their "
                "values are NaN. Define it (or _init_weights(layer) on a module around it), or load a checkpoint that "
                "has them.",
                stacklevel=4,
            )


def _constructed(module: nn.Module) -> Iterator[nn.Module]:
    """Every module once, children before their parent, as constructors finish."""
    seen: set[nn.Module] = set()

    def visit(one: nn.Module) -> Iterator[nn.Module]:
        if one in seen:
            return
        seen.add(one)
        for child in one.children():
            yield from visit(child)
        yield one

    yield from visit(module)


def _own_tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters(recurse=False)
    yield from layer.named_buffers(recurse=False)


def _whole_like(tensor: Tensor, device: torch.device) -> Tensor:
    full = torch.full(tensor.shape, _unset_value(tensor.dtype), dtype=tensor.dtype, device=device)
    return nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full


def _unset_value(dtype: torch.dtype) -> float:
    """What stands where nothing has given a value."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    if dtype is torch.bool:
        return 0
    limits = torch.iinfo(dtype)
    return limits.min or limits.max


def _is_unset(full: Tensor) -> bool:
    if full.dtype is torch.bool or not full.numel():
        return False
    unset = _unset_value(full.dtype)
    return bool((full.isnan() if math.isnan(unset) else full == unset).any())


def _as_before(full: Tensor, like: Tensor, device: torch.device) -> Tensor:
    if isinstance(like, DTensor):
        # A DTensor on meta keeps the device type of its mesh in the mesh.
        full = laid_out_like(full, _on_device(like, device))
    return nn.Parameter(full, like.requires_grad) if isinstance(like, nn.Parameter) else full


def _on_device(like: DTensor, device: torch.device) -> DTensor:
    return cast("DTensor", torch.empty_like(like, device=device))


def _put(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    # Not by setattr, behind which a sharding wrapper or a user's property may stand.
    for name, tensor in tensors.items():
        inside: Any = layer
        places: dict[str, Any] = inside._parameters if name in inside._parameters else inside._buffers
        places[name] = tensor


def _initialiser(layer: nn.Module) -> Callable[[], object] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # nn.MultiheadAttention has the latter
        found = getattr(layer, name, None)
        if callable(found):
            return cast("Callable[[], object]", found)
    return None


def _rule(layer: nn.Module) -> Callable[[nn.Module], object] | None:
    """``layer._init_weights``, if it takes one module."""
    found = getattr(layer, "_init_weights", None)
    if not callable(found):
        return None
    required = [
        one
        for one in inspect.signature(found).parameters.values()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) and one.default is one.empty
    ]
    return cast("Callable[[nn.Module], object]", found) if len(required) == 1 else None
