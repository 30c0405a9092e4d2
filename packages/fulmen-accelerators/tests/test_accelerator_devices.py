import os
import subprocess
import sys

import pytest
import torch

from fulmen_accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, find_usable_cuda_devices
from fulmen_accelerators._devices import parse_device_ids
from fulmen_protocols import ACCELERATORS, SupportsDeviceStats, load


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> CUDAAccelerator:
    """As on a machine where torch sees four devices; ours is the code under test, torch's count is the machine."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return CUDAAccelerator()


@pytest.mark.proves("2.6")
@pytest.mark.parametrize(
    ("devices", "ids"),
    [
        (1, [0]),
        (3, [0, 1, 2]),
        (-1, [0, 1, 2, 3]),
        ("-1", [0, 1, 2, 3]),
        ("3", [0, 1, 2]),
        ("3,", [3]),
        ("0,1", [0, 1]),
        ("0, 2", [0, 2]),
        ([3, 1], [3, 1]),
        ((2,), [2]),
        ("auto", [0, 1, 2, 3]),
    ],
)
def test_every_way_to_name_cuda_devices_gives_their_ids(four_gpus, devices, ids) -> None:
    assert four_gpus.parse_devices(devices) == ids
    assert four_gpus.get_parallel_devices(ids) == [torch.device("cuda", i) for i in ids]


@pytest.mark.proves("2.7")
@pytest.mark.parametrize(
    ("devices", "error", "says"),
    [
        (None, TypeError, "devices=None is a NoneType"),
        (2.0, TypeError, "is a float"),
        (True, TypeError, "is a bool"),
        ([True], TypeError, "holds True, a bool"),
        (["0"], TypeError, "holds '0', a str"),
        ({0, 1}, TypeError, "is a set"),
        (0, ValueError, "names no CUDA device"),
        ("0", ValueError, "names no CUDA device"),
        ([], ValueError, "names no CUDA device"),
        (",", ValueError, "names no CUDA device"),
        ("", ValueError, "is not understood"),
        ("two", ValueError, "devices='two' is not understood"),
        (-2, ValueError, "negative"),
        ([-1], ValueError, "negative"),
        ([1, 1], ValueError, "names CUDA device 1 more than once"),
        ("0,0", ValueError, "more than once"),
        (5, ValueError, "asks for 5 CUDA devices; this machine has 4: 0, 1, 2, 3"),
        ([1, 7], ValueError, "names CUDA device 7; this machine has 4: 0, 1, 2, 3"),
        ("6,7", ValueError, "names CUDA devices 6, 7;"),
    ],
)
def test_a_bad_devices_value_is_one_error_that_says_what_was_asked_and_what_exists(
    four_gpus, devices, error, says
) -> None:
    with pytest.raises(error, match=says):
        four_gpus.parse_devices(devices)


def test_asking_for_cuda_where_there_is_none_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    accelerator = CUDAAccelerator()
    assert not accelerator.is_available()
    with pytest.raises(ValueError, match=r"this machine has none that is usable\. CUDA_VISIBLE_DEVICES=''"):
        accelerator.parse_devices(1)


@pytest.mark.proves("2.8")
def test_under_torchrun_with_one_visible_device_each_several_can_be_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    accelerator = CUDAAccelerator()
    with pytest.raises(ValueError, match="this machine has 1"):
        accelerator.parse_devices(4)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")

    assert accelerator.parse_devices(4) == [0, 1, 2, 3]
    assert accelerator.get_parallel_devices([0, 1, 2, 3]) == [torch.device("cuda", 0)] * 4, "each process sees its own"
    assert accelerator.get_parallel_devices([0]) == [torch.device("cuda", 0)]
    with pytest.raises(ValueError, match="more than once"):
        accelerator.parse_devices([1, 1])


@pytest.mark.proves("2.8")
def test_under_torchrun_with_all_devices_visible_ids_are_still_checked(four_gpus, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with pytest.raises(ValueError, match="asks for 5"):
        four_gpus.parse_devices(5)


@pytest.mark.proves("2.9")
def test_auto_takes_one_cuda_device_in_an_interactive_session_and_says_so(four_gpus, monkeypatch, caplog) -> None:
    assert four_gpus.auto_device_count() == 4
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with caplog.at_level("INFO"):
        assert four_gpus.auto_device_count() == 1
    assert "takes 1 of 4 CUDA devices, because this session is interactive" in caplog.text


@pytest.mark.proves("2.15")
def test_counting_cuda_devices_neither_starts_cuda_nor_writes_the_environment() -> None:
    script = """
import os, torch
before = dict(os.environ)
from fulmen_accelerators import CUDAAccelerator
accelerator = CUDAAccelerator()
accelerator.is_available(); accelerator.auto_device_count()
assert dict(os.environ) == before
assert not torch.cuda.is_initialized()
pid = os.fork()
if pid == 0:
    os._exit(int(torch.cuda._is_in_bad_fork()))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "CUDA was poisoned for forked processes"
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)


@pytest.mark.proves("2.5")
@pytest.mark.parametrize(("devices", "count"), [(1, 1), (3, 3), ("2", 2), (" 2 ", 2), ("auto", 1)])
def test_cpu_devices_are_processes(devices, count) -> None:
    accelerator = CPUAccelerator()
    ids = accelerator.parse_devices(devices)
    assert ids == list(range(count))
    assert accelerator.get_parallel_devices(ids) == [torch.device("cpu")] * count


@pytest.mark.proves("2.5")
@pytest.mark.parametrize(
    ("devices", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        ("0", ValueError),
        ("-1", ValueError),
        ("all", ValueError),
        ("0,1", ValueError),
        ([0], TypeError),
        ([], TypeError),
        (True, TypeError),
        (1.0, TypeError),
        (None, TypeError),
    ],
)
def test_cpu_refuses_what_is_not_a_number_of_processes(devices, error) -> None:
    with pytest.raises(error, match=r"devices=.*for example devices=2"):
        CPUAccelerator().parse_devices(devices)


@pytest.mark.proves("2.5")
def test_auto_on_the_cpu_is_one_process_and_the_cpu_is_always_there() -> None:
    assert CPUAccelerator().auto_device_count() == 1
    assert CPUAccelerator().is_available()


@pytest.mark.proves("2.10")
@pytest.mark.parametrize("devices", [1, "1", -1, "-1", [0], "0,", (0,), "auto"])
def test_mps_has_one_device_with_id_0(devices, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.delenv("DISABLE_MPS", raising=False)
    accelerator = MPSAccelerator()
    assert accelerator.is_available()
    assert accelerator.parse_devices(devices) == [0]
    assert accelerator.get_parallel_devices([0]) == [torch.device("mps", 0)]
    with pytest.raises(ValueError, match="names MPS device 1; this machine has 1: 0"):
        accelerator.parse_devices([1])
    with pytest.raises(ValueError, match="asks for 2 MPS devices"):
        accelerator.parse_devices(2)


@pytest.mark.proves("2.10")
def test_mps_is_off_on_other_processors_and_where_the_environment_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("platform.processor", lambda: "i386")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not MPSAccelerator().is_available()
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert MPSAccelerator().is_available()
    monkeypatch.setenv("DISABLE_MPS", "1")
    assert not MPSAccelerator().is_available()
    with pytest.raises(ValueError, match=r"none that is usable\. DISABLE_MPS=1 is set"):
        MPSAccelerator().parse_devices(1)


@pytest.mark.proves("2.1")
@pytest.mark.parametrize("kind", [CPUAccelerator, CUDAAccelerator, MPSAccelerator])
def test_an_accelerator_is_found_by_the_name_it_gives_and_refuses_another_ones_device(kind) -> None:
    accelerator = load(ACCELERATORS, kind().name())
    assert type(accelerator) is kind
    assert isinstance(accelerator, SupportsDeviceStats)
    with pytest.raises(ValueError, match="got device 'meta'"):
        accelerator.setup_device(torch.device("meta"))
    accelerator.teardown()
    accelerator.teardown()


def test_cpu_setup_takes_the_cpu_and_leaves_the_environment_alone() -> None:
    before = dict(os.environ)
    CPUAccelerator().setup_device(torch.device("cpu"))
    assert dict(os.environ) == before


@pytest.mark.proves("2.16")
@pytest.mark.parametrize("kind", [CPUAccelerator, MPSAccelerator])
def test_host_stats_are_percentages(kind) -> None:
    pytest.importorskip("psutil")
    stats = kind().get_device_stats(torch.device("cpu"))
    prefix = "cpu" if kind is CPUAccelerator else "M1"
    assert set(stats) == {f"{prefix}_vm_percent", f"{prefix}_percent", f"{prefix}_swap_percent"}
    assert all(0.0 <= value <= 100.0 for value in stats.values())
    assert stats[f"{prefix}_vm_percent"] > 0.0


@pytest.mark.proves("2.16")
def test_stats_without_psutil_name_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r"pip install 'fulmen-accelerators\[stats\]'"):
        CPUAccelerator().get_device_stats(torch.device("cpu"))


@pytest.mark.proves("2.12")
@pytest.mark.parametrize("bad", [-2, True, "1"])
def test_searching_usable_devices_refuses_what_is_no_number(bad) -> None:
    with pytest.raises(ValueError, match="is not a number of devices"):
        find_usable_cuda_devices(bad)


@pytest.mark.proves("2.12")
def test_searching_more_usable_devices_than_are_visible_is_refused() -> None:
    visible = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"{visible + 1} CUDA devices were asked for; {visible} are visible"):
        find_usable_cuda_devices(visible + 1)
    assert find_usable_cuda_devices(0) == []


@pytest.mark.proves("2.6")
@pytest.mark.parametrize("available", [[0], [0, 1, 2], [4, 5]])
def test_a_count_takes_the_first_of_the_available_ids(available) -> None:
    assert parse_device_ids(-1, available, kind="X") == available
    assert parse_device_ids(1, available, kind="X") == available[:1]
    assert parse_device_ids(f"{available[-1]},", available, kind="X") == available[-1:]
