"""Accelerators by the names people look for here; they live in fulmen-accelerators and fulmen-xla."""

from typing import TYPE_CHECKING

from fulmen._not_here import elsewhere
from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, find_usable_cuda_devices
from fulmen_protocols import Accelerator

if TYPE_CHECKING:
    from fulmen_xla import XLAAccelerator as XLAAccelerator

_ELSEWHERE = {"XLAAccelerator": "fulmen_xla"}
_REFUSED = {
    "AcceleratorRegistry": "names come from the entry points of installed packages, fulmen.accelerators.v1. `fulmen "
    "plugins` lists them, and an accelerator without a name is passed as an object",
}

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "find_usable_cuda_devices"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return elsewhere("fulmen.accelerators", name, _ELSEWHERE, _REFUSED)
