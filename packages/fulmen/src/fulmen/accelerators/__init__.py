"""Accelerators by the names people look for here; they live in fulmen-accelerators and fulmen-xla."""

from typing import TYPE_CHECKING

from fulmen._not_here import elsewhere
from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, find_usable_cuda_devices
from fulmen_protocols import Accelerator

if TYPE_CHECKING:
    from fulmen_fabric.registry import ACCELERATOR_REGISTRY as ACCELERATOR_REGISTRY
    from fulmen_xla import XLAAccelerator as XLAAccelerator

    AcceleratorRegistry = ACCELERATOR_REGISTRY

_ELSEWHERE = {"XLAAccelerator": "fulmen_xla"}
_REGISTRY = {"ACCELERATOR_REGISTRY", "AcceleratorRegistry"}
"""Names of Lightning and of its Fabric for one thing."""

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "find_usable_cuda_devices"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name in _REGISTRY:
            from fulmen_fabric.registry import ACCELERATOR_REGISTRY

            return ACCELERATOR_REGISTRY
        return elsewhere("fulmen.accelerators", name, _ELSEWHERE, {})
