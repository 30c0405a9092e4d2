"""StragglerMonitor's clock on a GPU: the device's own times for the parts of steps, taken without waiting."""

from __future__ import annotations

import time
import warnings

import pytest
import torch

from fulmen._data_waits import DataWaits
from fulmen.callbacks._step_times import DATA, FORWARD, OUTSIDE, WAITING, step_times

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_parts_get_the_devices_time_and_the_loader_what_the_device_stood_still_for() -> None:
    device = torch.device("cuda", 0)
    waits = DataWaits(device)
    a = torch.randn(8192, 8192, device=device)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    times = step_times(device, waits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its sync debug mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for works in (1, 3):
            times.turn(OUTSIDE)
            for _ in range(20 * works):
                a @ a
            times.turn(FORWARD)
            times.turn(WAITING)
            times.end_step()
        unfinished = times.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    one, three = times.take()
    time.sleep(0.2)
    waits.rest.s += 0.2
    times.turn(OUTSIDE)
    times.end_step()
    torch.cuda.synchronize()
    (late,) = times.take()

    assert unfinished == [], "the device is still at work, and nobody has waited for it"
    assert three[FORWARD] == pytest.approx(3 * one[FORWARD], rel=0.3)
    assert one[WAITING] < 0.1 * one[FORWARD]
    assert late[DATA] == pytest.approx(0.2, rel=0.2)
