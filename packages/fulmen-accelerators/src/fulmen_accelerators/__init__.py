"""CPU, CUDA and MPS devices, for fulmen or for your own loop."""

from fulmen_accelerators.cpu import CPUAccelerator
from fulmen_accelerators.cuda import CUDAAccelerator, find_usable_cuda_devices
from fulmen_accelerators.mps import MPSAccelerator
from fulmen_accelerators.nvidia import get_nvidia_gpu_stats

__all__ = [
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "find_usable_cuda_devices",
    "get_nvidia_gpu_stats",
]
