"""Accelerators by the names people look for here; they live in fulmen-accelerators and fulmen-xla."""

from typing import TYPE_CHECKING

from fulmen._not_here import not_here
from fulmen._xla_names import from_xla
from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, find_usable_cuda_devices
from fulmen_protocols import Accelerator

if TYPE_CHECKING:
    from fulmen_xla import XLAAccelerator as XLAAccelerator

# Not in __all__, where a star import without fulmen-xla would end.
_OF_XLA = frozenset({"XLAAccelerator"})
_REFUSED = {
    "AcceleratorRegistry": "names come from the entry points of installed packages, fulmen.accelerators.v1. `fulmen "
    "plugins` lists them, and an accelerator without a name is passed as an object",
}

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "find_usable_cuda_devices"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name in _OF_XLA:
            return from_xla(__name__, name)
        raise not_here("fulmen.accelerators", name, _REFUSED)
