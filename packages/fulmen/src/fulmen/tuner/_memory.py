"""Running out of memory: how to recognise it, and how to let go of what the failed attempt held."""

from __future__ import annotations

import gc

import torch

__all__ = ["is_out_of_memory", "release_memory"]

_MESSAGES = (
    "out of memory",  # CUDA, ROCm, MPS and XLA alike
    "CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says of a batch that is too large for it (pytorch#4107)
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory; cuDNN and cuBLAS say so in words of their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def release_memory() -> None:
    """Free what is no longer referenced, on the host and in the device's cache. Waits for the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
