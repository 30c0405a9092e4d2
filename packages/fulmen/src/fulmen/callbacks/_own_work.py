"""Which parts of a step hold a rank's own work alone, and marks where waits for other ranks begin and end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fulmen._compiled_log import has_compiled_code
from fulmen._dynamo import never_compiled
from fulmen.callbacks._step_times import BACKWARD, FORWARD, WAITING
from fulmen_fabric.compiled import is_compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fulmen._session import Session

__all__ = ["OwnWork", "mark_waits", "own_work"]

_MOST_MARKED = 4


class OwnWork(NamedTuple):
    """What can be told apart from waits for other ranks."""

    forward: bool = False
    """The forward pass."""
    backward: bool = False
    """The backward pass: without accumulation up to the gradients that come last."""
    optimizer: bool = False
    """What follows it."""


def own_work(session: Session) -> OwnWork:
    """What can be told in a run, from the way in which its module communicates."""
    placed, mesh = session.placed, session.world.device_mesh
    modules = list(() if placed is None else placed.modules())
    if any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        return OwnWork()  # its layers wait for each other in both passes
    if isinstance(placed, DistributedDataParallel):
        return OwnWork(forward=True, backward=True, optimizer=True)
    axes = {} if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    splits_layers = any(size > 1 for name, size in axes.items() if name in ("tensor_parallel", "pipeline_parallel"))
    if splits_layers or not any(map(_is_sharded, modules)) or not session.module.automatic_optimization:
        return OwnWork()
    return OwnWork(forward=not any(map(_has_compiled, modules)), optimizer=True)


def mark_waits(session: Session, work: OwnWork, turn: Callable[[int, bool], None]) -> Iterator[Any]:
    """Hook into the module so that ``turn(part, is_forward)`` is called where ``part`` ends; gives the hooks' handles.

    ``is_forward`` tells a pass over layers that may run again in the backward pass.
    """

    @never_compiled
    def wait_begins(*_: object) -> None:
        turn(FORWARD, True)

    @never_compiled
    def wait_ends(*_: object) -> None:
        turn(WAITING, True)

    @never_compiled
    def gradient_is_there(_: object) -> None:
        turn(BACKWARD, False)

    placed = session.placed
    if placed is None or not work.forward:
        return
    if isinstance(placed, DistributedDataParallel):
        # Between the two DDP sends buffers from rank 0.
        yield placed.register_forward_pre_hook(wait_begins, prepend=True)
        yield cast("nn.Module", placed.module).register_forward_pre_hook(wait_ends)
        for parameter in _coming_late(session.module):
            yield cast("Any", parameter).register_post_accumulate_grad_hook(gradient_is_there)
        return
    for module in placed.modules():
        if _is_sharded(module):
            # Ours come before and after FSDP's own, in which a unit waits for its parameters.
            yield module.register_forward_pre_hook(wait_begins, prepend=True)
            yield module.register_forward_pre_hook(wait_ends)


def _coming_late(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of which one is probably the last to get its gradient: the first one of each part of the module."""
    children = list(module.children())[:_MOST_MARKED]
    seen = set[int]()
    for part in children or [module]:
        parameter = next((each for each in part.parameters() if each.requires_grad), None)
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter


def _is_sharded(module: nn.Module) -> bool:
    fsdp = cast("Any", sys.modules.get("torch.distributed.fsdp"))  # not there: nobody has sharded anything
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _has_compiled(module: nn.Module) -> bool:
    return is_compiled(module) or cast("Any", module)._compiled_call_impl is not None or has_compiled_code(module)
