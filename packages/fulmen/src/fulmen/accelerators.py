"""Accelerators by the names people look for here; they live in fulmen-accelerators."""

from typing import TYPE_CHECKING

from fulmen._not_here import not_here
from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, find_usable_cuda_devices
from fulmen_protocols import Accelerator

_REFUSED = {
    "AcceleratorRegistry": "names come from the entry points of installed packages, fulmen.accelerators.v1. `fulmen "
    "plugins` lists them, and an accelerator without a name is passed as an object",
}

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "find_usable_cuda_devices"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        raise not_here("fulmen.accelerators", name, _REFUSED)
