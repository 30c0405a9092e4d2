"""The mesh of a run: how many processes stand along each named dimension."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from torch.distributed.device_mesh import init_device_mesh

from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["MeshSizes"]

_MAIN = ("data_parallel", "tensor_parallel")
# From the rarest to the most frequent communication: neighbours in the last dimension are neighbouring ranks, which
# share a node.
_ORDER = ("pipeline_parallel", "data_parallel", "context_parallel", "tensor_parallel")


class MeshSizes:
    """What a user asked for, and the shape that follows from it for a number of processes.

    Args:
        owner: the strategy's name, for messages.
        asked: by dimension, a whole number of at least 1; for the two main ones ``"auto"`` as well.

    Raises:
        MisconfigurationException: a size is neither.
    """

    def __init__(self, owner: str, **asked: int | Literal["auto"]) -> None:
        for name, size in asked.items():
            may_be_auto = name in _MAIN
            if not (type(size) is int and size >= 1) and not (may_be_auto and size == "auto"):
                allowed = "a whole number of at least 1" + (" or 'auto'" if may_be_auto else "")
                raise MisconfigurationException(f"{owner} got {name}_size={size!r}: give {allowed}.")
        self._owner = owner
        self._asked = asked

    @property
    def has_stages(self) -> bool:
        """Whether the mesh has the dimension of a pipeline."""
        return self._asked.get("pipeline_parallel", 1) != 1

    def shape(self, num_devices: int, num_nodes: int) -> dict[str, int]:
        """Processes along each dimension, outermost first; a dimension that nobody asked for is left out.

        Where both main sizes are ``"auto"``, data parallel takes the nodes and tensor parallel the devices of a node,
        so that the frequent communication stays within a node. Where one is, it takes what the others leave.

        Raises:
            MisconfigurationException: the product is not the number of processes.
        """
        world_size = num_devices * num_nodes
        sizes = {name: size for name, size in self._asked.items() if size != "auto"}
        open_ones = [name for name in _MAIN if name not in sizes]
        if len(open_ones) == 2 and self._fits(sizes.values(), num_devices):
            sizes["data_parallel"], open_ones = num_nodes, ["tensor_parallel"]
        if open_ones and self._fits(sizes.values(), world_size):
            sizes[open_ones[0]] = world_size // math.prod(sizes.values())
            sizes.setdefault("tensor_parallel", 1)  # another dimension spans the nodes
        if not set(_MAIN) <= sizes.keys() or math.prod(sizes.values()) != world_size:
            raise self._mismatch(num_devices, num_nodes)
        return {name: sizes[name] for name in _ORDER if name in _MAIN or sizes.get(name, 1) > 1}

    @staticmethod
    def _fits(sizes: Iterable[int], processes: int) -> bool:
        return processes % math.prod(sizes) == 0

    def _mismatch(self, num_devices: int, num_nodes: int) -> MisconfigurationException:
        shown = ", ".join(f"{name}_size={self._asked[name]!r}" for name in _ORDER if self._asked[name] != 1)
        main = ", ".join(f"{name}_size={self._asked[name]!r}" for name in _MAIN)
        found = f"{num_devices * num_nodes} processes (devices={num_devices}, num_nodes={num_nodes})"
        return MisconfigurationException(
            f"{self._owner} got {shown or main}, but the run has {found}: give sizes whose product is that number, or "
            "leave one at 'auto'."
        )

    def make(self, device: torch.device, num_devices: int, num_nodes: int) -> DeviceMesh:
        """The mesh over all processes of the group. A collective."""
        shape = self.shape(num_devices, num_nodes)
        return init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
