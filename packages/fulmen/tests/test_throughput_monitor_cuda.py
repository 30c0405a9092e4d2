"""ThroughputMonitor's clock on a GPU: the device's own times, taken without waiting."""

from __future__ import annotations

import time
import warnings
from itertools import pairwise

import pytest
import torch

from fulmen.callbacks._device_clock import DeviceClock

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.proves("11.18")
def test_marks_do_not_wait_and_tell_when_the_device_was_done() -> None:
    device = torch.device("cuda", 0)
    a = torch.randn(8192, 8192, device=device)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    clock, marks = DeviceClock(device), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its sync debug mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            a @ a
            marks.append(clock.mark())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = [*clock.read(marks[:7]), *clock.read(marks[7:])]
    spent = time.perf_counter() - began

    assert seconds[-1] <= spent
    assert seconds == sorted(seconds)
    steps = [after - before for before, after in pairwise(seconds)]
    assert min(steps) > 0, "each product takes its share of the device's time"
