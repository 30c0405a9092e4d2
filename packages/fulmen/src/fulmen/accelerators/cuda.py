"""CUDA devices, where Lightning has them."""

import torch

from fulmen_accelerators import CUDAAccelerator, find_usable_cuda_devices, get_nvidia_gpu_stats

__all__ = [
    "CUDAAccelerator",
    "find_usable_cuda_devices",
    "get_nvidia_gpu_stats",
    "is_cuda_available",
    "num_cuda_devices",
]


def num_cuda_devices() -> int:
    """Visible CUDA devices, counted without starting CUDA where NVML answers."""
    return torch.cuda.device_count()


def is_cuda_available() -> bool:
    """Whether there is a CUDA device."""
    return num_cuda_devices() > 0
