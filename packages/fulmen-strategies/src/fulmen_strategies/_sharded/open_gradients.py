"""Gradients that wait for the end of an accumulation window, of parameters that are spread over ranks: save and load.

A gradient is one of two kinds. Where ranks have added theirs up it is laid out like its parameter, and can be spread
over any ranks again. Where they have not (FSDP keeps whole gradients until the window's last batch; sums of a layer's
tensor-parallel ranks may be pending) each rank has its own, which only the same ranks can take back.

The state of both, as it stands in a checkpoint::

    added    by name: whole tensors on rank 0, or DTensors
    own      bytes, shape (ranks, longest): of each rank its gradients, one after the other; None where there are none
    layouts  of each rank, in the order of those bytes: (name, dtype, shape, placements)

Every function is called by every rank. ``root`` is what FSDP was applied to: ``module``, whose names count, or what is
around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fulmen_protocols.errors import CheckpointError
from fulmen_strategies._sharded.entry import parameter_groups, spec_of_whole
from fulmen_strategies._sharded.layout import laid_out_like, local, to_host
from fulmen_strategies._sharded.states import canonical, reshard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

    from fulmen_strategies._pipeline import Stages
    from fulmen_strategies.collectives import TorchCollectives

__all__ = ["has_open_gradients", "load_open_gradients", "open_gradients"]

# Each gradient's bytes begin at such a multiple, so that they can be viewed as any dtype.
_ALIGNMENT = 16


class _Found(NamedTuple):
    """A parameter with a gradient, or to be given one."""

    name: str
    parameter: nn.Parameter
    shards: Any
    """FSDP's own record of the parameter; None where FSDP does not have it."""

    @property
    def waiting(self) -> Tensor | None:
        """The whole gradient that FSDP has not reduced yet."""
        if self.shards is None:
            return None
        summed: Tensor | None = self.shards.unsharded_accumulated_grad
        whole = getattr(self.shards, "_unsharded_param", None)  # there from the first gathering on
        return whole.grad if summed is None and whole is not None else summed


def has_open_gradients(root: nn.Module, module: nn.Module) -> bool:
    """Whether any parameter of ``module`` has a gradient, reduced or not."""
    return any(one.parameter.grad is not None or one.waiting is not None for one in _each(root, module))


def open_gradients(
    root: nn.Module, module: nn.Module, collectives: TorchCollectives, *, full: bool, stages: Stages | None = None
) -> dict[str, object]:
    """The state of all gradients; with ``full`` whole, on the CPU and on rank 0 only, otherwise as DTensors.

    ``stages``: of a pipeline, whose ranks have different modules; it needs ``full``.
    """
    reshard(root)
    keeps = collectives.rank == 0 if stages is None else stages.is_first
    added: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, parameter, shards in _each(root, module):
        gradient, waiting = parameter.grad, _Found(name, parameter, shards).waiting
        if waiting is not None:
            own[name] = waiting.detach()
        if gradient is None:
            continue
        if _is_laid_out_like(gradient, parameter):
            value = to_host(gradient) if full else gradient.detach()
            if not full or keeps:
                added[name] = value
        elif waiting is None:
            own[name] = gradient.detach()
    rows = [(name, str(one.dtype).removeprefix("torch."), tuple(local(one).shape), _placements(one))
            for name, one in own.items()]  # fmt: skip
    if stages is not None:
        added = stages.join_states(added)
    layouts = collectives.all_gather_object(rows)
    state: dict[str, object] = {"added": added, "own": None, "layouts": layouts}
    longest = max(_bytes_of(each) for each in layouts)
    if longest:
        packed = _packed([local(one) for one in own.values()], longest)
        state["own"] = _on_first(packed, collectives) if full else _spread(packed, collectives)
    return state if collectives.rank == 0 or not full else {}


def load_open_gradients(
    root: nn.Module, module: nn.Module, collectives: TorchCollectives, state: Mapping[str, Any]
) -> None:
    """Give parameters the gradients that ``open_gradients`` found; ``state`` is whole, on every rank.

    Raises:
        CheckpointError: gradients that are each rank's own, and there are other ranks now.
    """
    reshard(root)
    mine = _unpacked(state, collectives)
    for name, parameter, shards in _each(root, module):
        if name in state["added"]:
            parameter.grad = laid_out_like(state["added"][name], parameter)
        if name not in mine:
            continue
        value, placements = mine[name]
        if shards is not None:
            spec = spec_of_whole(shards)
            like = None if spec is None else (spec.mesh, spec.shape, spec.stride)
            expected = tuple(shards._orig_size) if spec is None else None
        else:
            here: Tensor = parameter
            like = (here.device_mesh, here.shape, here.stride()) if isinstance(here, DTensor) else None
            expected = None if like is not None else tuple(here.shape)
        if (like is None) != (placements is None) or (expected is not None and tuple(value.shape) != expected):
            raise CheckpointError(
                f"this checkpoint was saved inside an accumulation window, and its gradient of {name!r} is laid out "
                "otherwise than the parameter is now. Resume with the strategy and mesh that saved it, or from a "
                "checkpoint that was saved at the end of a window."
            )
        value = value.to(parameter.device if shards is None else shards.device, copy=True)
        whole = value if like is None else _from_local(value, *like, cast("str", placements))
        if shards is None:
            parameter.grad = whole
        else:
            shards.unsharded_accumulated_grad = whole


def _each(root: nn.Module, module: nn.Module) -> Iterator[_Found]:
    """Parameters by their names outside ``torch.compile``, and what FSDP knows of each."""
    records: dict[int, Any] = {}
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            for group in parameter_groups(cast("Any", unit)._get_fsdp_state()):
                records.update((id(record.sharded_param), record) for record in group.fsdp_params)
    for name, parameter in module.named_parameters():
        yield _Found(canonical(name), parameter, records.get(id(parameter)))


def _is_laid_out_like(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether ranks have added up their parts."""
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return False
    return gradient.device_mesh == parameter.device_mesh and gradient.placements == parameter.placements


# -- of one rank ------------------------------------------------------------------------------------------------------


def _placements(tensor: Tensor) -> str | None:
    """How a DTensor lies on its mesh, as text; None for other tensors."""
    if not isinstance(tensor, DTensor):
        return None
    return ",".join(_word(placement) for placement in tensor.placements)


def _word(placement: Placement) -> str:
    if type(placement) is Shard:
        return f"shard {placement.dim}"
    if isinstance(placement, Replicate):
        return "replicate"
    if type(placement) is Partial:
        return f"partial {placement.reduce_op}"
    raise CheckpointError(
        f"this checkpoint was not saved: a gradient of the open accumulation window is laid out as {placement}, which "
        "cannot be restored. Save at the end of a window."
    )


def _from_local(value: Tensor, mesh: DeviceMesh, shape: Any, stride: Any, placements: str) -> Tensor:
    kinds: list[Placement] = []
    for word in placements.split(","):
        kind, _, argument = word.partition(" ")
        kinds.append(Shard(int(argument)) if kind == "shard" else Partial(argument) if argument else Replicate())
    return DTensor.from_local(value, mesh, kinds, run_check=False, shape=shape, stride=stride)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _size(dtype: str, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * cast("torch.dtype", getattr(torch, dtype)).itemsize


def _bytes_of(rows: Sequence[tuple[str, str, Sequence[int], str | None]]) -> int:
    return sum(_padded(_size(dtype, shape)) for _, dtype, shape, _ in rows)


def _packed(tensors: Sequence[Tensor], length: int) -> Tensor:
    packed = torch.zeros(length, dtype=torch.uint8)
    offset = 0
    for tensor in tensors:
        size = tensor.nbytes
        packed[offset : offset + size].copy_(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8))
        offset += _padded(size)
    return packed


# -- of all ranks -----------------------------------------------------------------------------------------------------


def _on_first(packed: Tensor, collectives: TorchCollectives) -> Tensor | None:
    """All ranks' bytes on rank 0, where no other rank ever holds more than those of one."""
    first = collectives.rank == 0
    whole = packed.new_empty((collectives.world_size, packed.numel())) if first else None
    for rank in range(collectives.world_size):
        row = collectives.broadcast(packed if rank == collectives.rank else torch.empty_like(packed), rank)
        if whole is not None:
            whole[rank] = row
    return whole


def _spread(packed: Tensor, collectives: TorchCollectives) -> Tensor:
    mesh = init_device_mesh("cpu", (collectives.world_size,))
    return DTensor.from_local(packed[None], mesh, [Shard(0)], run_check=False)


def _unpacked(state: Mapping[str, Any], collectives: TorchCollectives) -> dict[str, tuple[Tensor, str | None]]:
    """This rank's own gradients by name, with their placements."""
    layouts: list[Any] = state["layouts"]
    if state["own"] is None:
        return {}
    if len(layouts) != collectives.world_size:
        raise CheckpointError(
            f"this checkpoint was saved inside an accumulation window by {len(layouts)} processes, which each hold "
            f"their own gradients; {collectives.world_size} cannot share them. Resume with {len(layouts)}, or from a "
            "checkpoint that was saved at the end of a window."
        )
    row: Tensor = state["own"][collectives.rank]
    found: dict[str, tuple[Tensor, str | None]] = {}
    offset = 0
    for name, dtype, shape, placements in layouts[collectives.rank]:
        size = _size(dtype, shape)
        value = row[offset : offset + size].view(getattr(torch, dtype)).view(tuple(shape))
        found[name] = (value, placements)
        offset += _padded(size)
    return found
