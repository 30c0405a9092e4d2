"""How tensors are spread over the devices of a mesh, in torch-xla's SPMD mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from fulmen_xla._host import tensors_of
from fulmen_xla._library import library

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = [
    "ByFirstDimension",
    "make_mesh",
    "mark_again",
    "marks_of",
    "shard_optimizer_state",
    "shard_output",
]


def make_mesh(devices: int, copies: int) -> Any:
    """All devices as ``copies`` rows of shards."""
    import numpy as np  # which torch-xla brings

    spmd = library("distributed.spmd")
    return spmd.Mesh(np.arange(devices), (copies, devices // copies), ("data", "fsdp"))


class ByFirstDimension:
    """Spreads tensors of any rank along their first dimension over all devices; numbers stay whole on each.

    Has the members of torch-xla's ``ShardingSpec`` that an upload asks for; that one is for tensors of a single rank.
    """

    minibatch = False

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh
        self._by_rank: dict[int, Any] = {}

    def xla_spec(self, tensor: Tensor) -> Any:
        """torch-xla's own description for ``tensor``; None: it is not spread."""
        rank = tensor.dim()
        if rank == 0:
            return None
        if rank not in self._by_rank:
            spmd = library("distributed.spmd")
            self._by_rank[rank] = spmd.ShardingSpec(self._mesh, (("data", "fsdp"), *[None] * (rank - 1)))
        return self._by_rank[rank].xla_spec(tensor)


def shard_output(output: object, mesh: Any) -> None:
    """Spread what a ``forward`` returns along its first dimension: each device computes its part of the batch."""
    spmd = library("distributed.spmd")
    for tensor in tensors_of(output):
        if tensor.device.type == "xla" and tensor.dim() > 0:
            spmd.mark_sharding(tensor, mesh, (("data", "fsdp"), *[None] * (tensor.dim() - 1)))


def _is_marked(tensor: Tensor) -> bool:
    return bool(library()._XLAC._get_xla_sharding_spec(tensor))


def _mark_like(tensor: Tensor, model: Any) -> None:
    if model is not None and not _is_marked(tensor):
        library()._XLAC._xla_mark_sharding(tensor, model)


def _mark_of(tensor: Tensor) -> Any:
    return library()._XLAC._get_xla_op_sharding(tensor) if _is_marked(tensor) else None


def shard_optimizer_state(optimizer: Optimizer, mesh: Any) -> None:
    """Spread every tensor that the optimizer keeps for a parameter of the same shape as that parameter is spread."""
    for parameter, kept in cast("dict[Tensor, dict[str, object]]", optimizer.state).items():
        mark = _mark_of(parameter)
        for value in kept.values():
            if isinstance(value, Tensor) and value.device.type == "xla" and value.shape == parameter.shape:
                _mark_like(value, mark)


def marks_of(module: nn.Module) -> dict[str, Any]:
    """How each parameter is spread, by name."""
    return {name: _mark_of(parameter) for name, parameter in module.named_parameters()}


def mark_again(module: nn.Module, marks: dict[str, Any]) -> None:
    """Spread parameters as they were, where new values have come whole."""
    for name, parameter in module.named_parameters():
        _mark_like(parameter, marks.get(name))
