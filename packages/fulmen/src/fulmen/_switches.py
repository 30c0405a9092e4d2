"""torch's global switches that a run sets, and gives back as it found them."""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from fulmen.settings import Settings

__all__ = ["anomaly_detection", "determinism"]


@contextmanager
def determinism(settings: Settings) -> Generator[None, None, None]:
    """``deterministic`` and ``benchmark``."""
    benchmark = settings.benchmark
    if settings.deterministic and benchmark is None:
        benchmark = False
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    if settings.deterministic:
        # cuBLAS reads it when its first handle is made; without it torch refuses deterministic matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=settings.deterministic == "warn")
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]


def anomaly_detection(settings: Settings) -> AbstractContextManager[object]:
    """``detect_anomaly``."""
    return torch.autograd.set_detect_anomaly(True) if settings.detect_anomaly else nullcontext()
