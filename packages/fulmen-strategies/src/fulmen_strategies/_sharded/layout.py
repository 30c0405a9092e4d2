"""Between a whole tensor and the part of it that this rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fulmen_strategies.collectives import TorchCollectives

__all__ = ["each_from_first", "laid_out_like", "local", "map_tensors", "to_host", "whole"]


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory; ``tensor`` itself where it is no DTensor. For use without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank. A collective of its mesh where it is a DTensor.

    A part that is offloaded to the host travels through the mesh's device.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    device = tensor.device_mesh.device_type
    there = tensor if tensor.device.type == device else cast("DTensor", tensor.to(device))
    return there.full_tensor()


def to_host(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, sharing no memory with ``tensor``. A collective, as ``whole``."""
    full = whole(tensor.detach())
    return full.to("cpu", copy=full.data_ptr() == local(tensor.detach()).data_ptr())


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """The whole tensor ``value``, which every rank has, in the layout, dtype and on the device of ``like``.

    No collective: each rank takes its part.
    """
    value = value.detach().to(like.dtype)
    if not isinstance(like, DTensor):
        return value.to(like.device)
    mesh = like.device_mesh
    part = distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return part if part.device.type == like.device.type else part.to(like.device)


def map_tensors(function: Callable[[Tensor], object], tree: object) -> Any:
    """``tree`` of dicts, lists and tuples with every tensor replaced by what ``function`` makes of it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in cast("dict[object, object]", tree).items()}
    if type(tree) in (list, tuple):
        items = [map_tensors(function, value) for value in cast("list[object]", tree)]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def each_from_first(state: Mapping[str, object], collectives: TorchCollectives) -> Iterator[tuple[str, object]]:
    """Rank 0's entries on every rank, one at a time: never more than one whole tensor is in memory beside them.

    Every rank must exhaust it. Tensors arrive on the CPU, on rank 0 they are its own.
    """
    first = collectives.rank == 0
    outline = {name: _Absent.of(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    for name, value in collectives.broadcast_object(outline if first else {}).items():
        if isinstance(value, _Absent):
            tensor = cast("Tensor", state[name]).detach() if first else torch.empty(value.shape, dtype=value.dtype)
            yield name, collectives.broadcast(tensor)
        else:
            yield name, value


class _Absent:
    """Stands for a tensor that follows."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Absent:
        """The one for ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)
