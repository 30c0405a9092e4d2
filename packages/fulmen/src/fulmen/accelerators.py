"""Accelerators by the names people look for here; they live in fulmen-accelerators."""

from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, find_usable_cuda_devices
from fulmen_protocols import Accelerator

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "find_usable_cuda_devices"]
