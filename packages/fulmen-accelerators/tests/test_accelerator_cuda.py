"""What needs a real CUDA device."""

import os
import subprocess
import sys

import pytest
import torch

from fulmen_accelerators import CUDAAccelerator, find_usable_cuda_devices, get_nvidia_gpu_stats

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.proves("2.13", "2.14")
def test_setup_makes_the_device_current_logs_it_and_writes_no_environment(caplog) -> None:
    accelerator = CUDAAccelerator()
    before = dict(os.environ)
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    with caplog.at_level("INFO"):
        accelerator.setup_device(last)
    assert torch.cuda.current_device() == last.index
    assert torch.cuda.get_device_name(last) in caplog.text
    assert dict(os.environ) == before


@pytest.mark.proves("2.13")
def test_the_hint_at_tensor_cores_comes_once_and_only_at_highest_precision() -> None:
    script = """
import logging, torch
from fulmen_accelerators import CUDAAccelerator
logging.basicConfig(level="INFO", format="%(message)s")
torch.set_float32_matmul_precision({precision!r})
for _ in range(2):
    CUDAAccelerator().setup_device(torch.device("cuda", 0))
"""
    hints = {}
    for precision in ("highest", "high"):
        command = [sys.executable, "-c", script.format(precision=precision)]
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        hints[precision] = run.stderr.count("set_float32_matmul_precision")
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    assert hints == {"highest": int(ampere), "high": 0}


@pytest.mark.proves("2.13", "2.16")
def test_stats_count_the_memory_that_was_taken_and_teardown_gives_the_cache_back() -> None:
    accelerator, device = CUDAAccelerator(), torch.device("cuda", 0)
    before = accelerator.get_device_stats(device)
    tensor = torch.zeros(1 << 20, device=device)
    during = accelerator.get_device_stats(device)
    key = "allocated_bytes.all.current"
    assert during[key] - before.get(key, 0.0) >= tensor.nbytes
    del tensor
    accelerator.teardown()
    accelerator.teardown()
    assert torch.cuda.memory_reserved(device) == torch.cuda.memory_allocated(device) or (
        torch.cuda.memory_reserved(device) < during["reserved_bytes.all.current"]
    )


@pytest.mark.proves("2.12")
def test_usable_devices_are_found_and_hold_memory() -> None:
    found = find_usable_cuda_devices()
    assert found == find_usable_cuda_devices(len(found))
    assert set(found) <= set(range(torch.cuda.device_count()))
    assert len(find_usable_cuda_devices(1)) == 1


@pytest.mark.proves("2.12")
def test_too_few_usable_devices_is_an_error_that_names_those_that_refused(monkeypatch) -> None:
    real = torch.cuda.device_count()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: real + 1)
    with pytest.raises(RuntimeError, match=f"{real} of {real + 1} visible ones are usable and {real} refused memory"):
        find_usable_cuda_devices(real + 1)
    assert find_usable_cuda_devices() == list(range(real))


def test_nvidia_smi_counters_are_of_that_device() -> None:
    stats = get_nvidia_gpu_stats(torch.device("cuda", 0))
    total = torch.cuda.get_device_properties(0).total_memory / 2**20
    assert 0.0 <= stats["utilization.gpu (%)"] <= 100.0
    assert stats["memory.used (MB)"] + stats["memory.free (MB)"] == pytest.approx(total, rel=0.05)
