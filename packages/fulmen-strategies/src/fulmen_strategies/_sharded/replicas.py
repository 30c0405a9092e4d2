"""Tensors of which several ranks of a mesh hold the same part: who they are, and how they start with equal values."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch.distributed.tensor import DTensor, Replicate

from fulmen_strategies._sharded.layout import local
from fulmen_strategies.collectives import TorchCollectives

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["dimensions", "ranks_of", "share_values"]


def dimensions(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of a mesh's dimensions."""
    return mesh.mesh_dim_names or ()


def ranks_of(mesh: DeviceMesh) -> set[int]:
    """The global ranks that stand on ``mesh``."""
    return set(cast("list[int]", mesh.mesh.flatten().tolist()))


def share_values(module: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Make equal what is taken for equal: along dimensions on which a tensor is whole, the first rank's counts.

    A plan leaves layers out, and a user's random state may differ between ranks. A collective of all ranks of ``mesh``;
    what has no memory yet is left out.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            for collectives in _replicas(tensor, mesh, device):
                collectives.broadcast(local(tensor.detach()))


def _replicas(tensor: Tensor, mesh: DeviceMesh, device: torch.device) -> Iterator[TorchCollectives]:
    """The groups of ranks that hold the same part of ``tensor``."""
    spread = ranks_of(tensor.device_mesh) if isinstance(tensor, DTensor) else set[int]()
    for name in dimensions(mesh):
        along = mesh[name]
        # A stage of a pipeline is a module of its own.
        if name != "pipeline_parallel" and along.size() > 1 and not spread >= ranks_of(along):
            yield TorchCollectives(device, along.get_group())
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Replicate) and tensor.device_mesh.size(axis) > 1:
                yield TorchCollectives(device, tensor.device_mesh.get_group(axis))
