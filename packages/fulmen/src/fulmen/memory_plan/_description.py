"""What a module and its optimizers consist of: tensors, their placement, the mesh."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from fulmen.memory_plan._allocations import local_tensors, storage_bytes
from fulmen.memory_plan.report import ParameterGroup

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

__all__ = ["groups_of", "mesh_of", "state_tensors", "tensors_of", "unique"]


def tensors_of(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def unique(tensors: Iterable[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    for tensor in tensors:
        key = id(tensor) if isinstance(tensor, nn.Parameter) else id(local_tensors(tensor)[0])
        found.setdefault(key, tensor)
    return list(found.values())


def state_tensors(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [tensor for optimizer in optimizers for tensor in tensors_of(list(optimizer.state.values()))]


def mesh_of(parameters: Iterable[nn.Parameter]) -> str:
    """Dimensions and sizes of the mesh with the most dimensions over which a parameter is spread."""
    meshes = [parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)]
    if not meshes:
        return ""
    largest = max(meshes, key=lambda mesh: mesh.ndim)
    return " x ".join(f"{name} {size}".strip() for name, size in zip(_names(largest), largest.shape, strict=True))


def _names(mesh: DeviceMesh) -> Sequence[str]:
    return mesh.mesh_dim_names or [""] * mesh.ndim


def _placement(parameter: nn.Parameter) -> str:
    """Such as ``"data_parallel Shard(0), tensor_parallel Shard(1)"``."""
    if not isinstance(parameter, DTensor):
        return "whole"
    words: list[str] = []
    for name, one in zip(_names(parameter.device_mesh), parameter.placements, strict=True):
        kind = f"Shard({cast('Any', one).dim})" if one.is_shard() else "Replicate" if one.is_replicate() else str(one)
        words.append(f"{name} {kind}".strip())
    return ", ".join(words)


def groups_of(module: nn.Module) -> tuple[ParameterGroup, ...]:
    """Parameters that differ only in the numbers of their names, in the order of the model.

    ``layers.0.weight`` and ``layers.1.weight`` are of one kind, ``w1.weight`` and ``w2.weight`` are not.
    """
    found: dict[tuple[Any, ...], list[Any]] = {}
    for name, parameter in module.named_parameters():
        placement = _placement(parameter)
        key = (
            re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", name),
            tuple(parameter.shape),
            str(parameter.dtype).removeprefix("torch."),
            placement,
            parameter.requires_grad,
        )
        found.setdefault(key, []).append((name, parameter))
    return tuple(
        ParameterGroup(
            name=name if len(members) > 1 else members[0][0],
            count=len(members),
            shape=shape,
            dtype=dtype,
            placement=placement,
            trainable=trainable,
            local_bytes=storage_bytes(parameter for _, parameter in members),
        )
        for (name, shape, dtype, placement, trainable), members in found.items()
    )
