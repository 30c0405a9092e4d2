"""Memory: recognising that there was not enough of it, and giving some back."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from fulmen_fabric import map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "garbage_collection_cuda",
    "is_cuda_out_of_memory",
    "is_cudnn_snafu",
    "is_oom_error",
    "is_out_of_cpu_memory",
    "recursive_detach",
]

T = TypeVar("T")


def recursive_detach(in_dict: T, to_cpu: bool = False) -> T:
    """The same nested collection with every tensor detached, and copied to the CPU if asked (which waits for it)."""

    def detach(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().cpu() if to_cpu else leaf.detach()

    return cast("T", map_leaves(detach, in_dict))


def is_oom_error(exception: BaseException) -> bool:
    """Whether a device or the host ran out of memory; cuDNN and cuBLAS say so in words of their own."""
    return (
        isinstance(exception, (torch.OutOfMemoryError, MemoryError))
        or _says(exception, "out of memory")  # CUDA, ROCm, MPS and XLA alike
        or is_cudnn_snafu(exception)
        or is_out_of_cpu_memory(exception)
        or _says(exception, "CUDNN_STATUS_ALLOC_FAILED")
        or _says(exception, "CUBLAS_STATUS_ALLOC_FAILED")
    )


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Whether a CUDA device ran out of memory."""
    return _says(exception, "CUDA", "out of memory")


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether cuDNN refused an operation, as it does when memory is short (pytorch#4107)."""
    return _says(exception, "CUDNN_STATUS_NOT_SUPPORTED")


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether the host ran out of memory for tensors."""
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return any(_says(exception, each) for each in words)


def _says(exception: BaseException, *words: str) -> bool:
    # CUDA reports this by message alone in some of its libraries.
    return isinstance(exception, RuntimeError) and all(word in str(exception) for word in words)


def garbage_collection_cuda() -> None:
    """Collect garbage, and give cached, unused memory of CUDA or MPS back to the device."""
    gc.collect()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if not cast("Callable[[], bool]", torch.cuda.is_initialized)():
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if not is_oom_error(error):  # a device without any free memory may refuse even this
            raise
