"""Collectives over nested collections of tensors and numbers, with Lightning's rules on top of the protocol's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from fulmen_fabric.transfer import map_leaves
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_fabric.world import World
    from fulmen_protocols import ReduceOp

__all__ = ["all_gather", "all_reduce", "broadcast"]

T = TypeVar("T")
_REDUCE_OPS: dict[str, ReduceOp] = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max"}


def broadcast(world: World, move: Callable[[object], object], obj: T, src: int) -> T:
    """Rank ``src``'s ``obj``. Its tensors travel through the host: pickled ones would land on the sender's device."""
    if world.world_size == 1:
        return obj
    on_device: list[bool] = []

    def to_cpu(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            on_device.append(True)
            return leaf.cpu()
        return leaf

    sending = world.rank == src
    sent = map_leaves(to_cpu, obj) if sending else None
    received, moved = world.collectives.broadcast_object((sent, bool(on_device)), src)
    if sending:
        return obj
    return cast("T", move(received) if moved else received)


def all_gather(world: World, data: object, sync_grads: bool) -> object:
    """Stacked over ranks, shape ``(world_size, *shape)``; in one process the input without a new dimension."""
    tensors = _as_tensors(data, world.device)
    if world.world_size == 1:
        return tensors
    return _on_tensors(partial(world.collectives.all_gather, differentiable=sync_grads), tensors)


def all_reduce(world: World, data: object, reduce_op: str) -> object:
    """Combined over ranks."""
    op = _REDUCE_OPS.get(str(reduce_op).lower())
    if op is None:
        raise MisconfigurationException(f"all_reduce got reduce_op={reduce_op!r}. Use one of {', '.join(_REDUCE_OPS)}.")
    tensors = _as_tensors(data, world.device)
    return tensors if world.world_size == 1 else _on_tensors(partial(world.collectives.all_reduce, op=op), tensors)


def _on_tensors(function: Callable[[Tensor], Tensor], data: object) -> object:
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, data)


def _as_tensors(data: object, device: torch.device) -> object:
    def convert(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        return torch.tensor(leaf, device=device) if isinstance(leaf, (bool, int, float)) else leaf

    return map_leaves(convert, data)
