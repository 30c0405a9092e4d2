"""Modules that were created on the meta device get memory and the values that creating them here would have given."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fulmen_strategies._sharded.layout import laid_out_like

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fulmen_strategies.collectives import TorchCollectives

__all__ = ["is_on_meta", "materialise"]


def is_on_meta(module: nn.Module) -> bool:
    """Whether any parameter or buffer of ``module`` has no memory yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def materialise(
    module: nn.Module, device: torch.device, collectives: TorchCollectives, *, initialise: bool = True
) -> None:
    """Give every meta tensor of ``module`` memory on ``device``, in place, and its first value.

    Layer by layer, in the order in which their constructors ran, ``reset_parameters`` draws whole tensors on ``device``
    from this moment's random state; rank 0's count, and of a DTensor each rank keeps its shard. So with one seed the
    values are those of one process that creates the module on ``device``, for layers that draw as their constructors
    do (those of torch), and never more than one layer is whole in memory.

    Args:
        module: sharded already, or not. Tied parameters stay tied.
        device: of this rank.
        collectives: among the ranks that share the module.
        initialise: False leaves values undefined, for a checkpoint to fill.
    """
    before = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_meta}
    made: dict[int, Tensor] = {}
    silent: set[str] = set()
    for layer in list(_constructed(module)):
        own = {name: tensor for name, tensor in _own_tensors(layer) if id(tensor) in before}
        if not own:
            continue
        _put(layer, {name: _whole_like(tensor, device) for name, tensor in own.items()})
        if initialise:
            reset = _initialiser(layer)
            if reset is not None:
                reset()
            else:
                silent.add(type(layer).__name__)
        drawn = dict(_own_tensors(layer))
        for name, tensor in own.items():
            if id(tensor) not in made:
                full = drawn[name].detach()
                if initialise:
                    collectives.broadcast(full)
                made[id(tensor)] = _as_before(full, tensor, device)
        _put(layer, {name: made[id(tensor)] for name, tensor in own.items()})
    if silent and collectives.rank == 0:
        warnings.warn(
            f"{', '.join(sorted(silent))} held tensors on the meta device and has no reset_parameters(): their values "
            "are undefined. Define it, or load a checkpoint that has them.",
            stacklevel=2,
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
    full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full


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
