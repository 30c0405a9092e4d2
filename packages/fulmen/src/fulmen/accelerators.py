"""Accelerators by the names people look for here; they live in fulmen-accelerators and fulmen-xla."""

from typing import TYPE_CHECKING

from fulmen._xla_names import from_xla
from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, find_usable_cuda_devices

if TYPE_CHECKING:
    from fulmen_xla import XLAAccelerator as XLAAccelerator

__all__ = ["CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "find_usable_cuda_devices"]


def __getattr__(name: str) -> object:
    return from_xla(__name__, name, frozenset({"XLAAccelerator"}))
