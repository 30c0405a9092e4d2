"""What is refused before any device is opened: without torch-xla, with one for another torch, and with wrong options.

None of this needs torch-xla: where options are tested, an empty distribution of its name and the right version is on
the path, which must not be imported.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fulmen_xla
from fulmen_protocols import (
    BackendUnavailable,
    MisconfigurationException,
    MissingPackage,
    PrecisionPlan,
    Topology,
    load,
)
from fulmen_protocols.seams import ACCELERATORS, CHECKPOINT_IOS, CLUSTER_ENVIRONMENTS, LAUNCHERS, STRATEGIES
from fulmen_xla import (
    SingleDeviceXLAStrategy,
    XLAAccelerator,
    XLACheckpointIO,
    XLAEnvironment,
    XLAFSDPStrategy,
    XLALauncher,
    XLAPrecision,
    XLAShardedCheckpointIO,
    XLASPMDStrategy,
    XLAStrategy,
)
from fulmen_xla._library import check_pair
from fulmen_xla._library import load as load_module
from fulmen_xla.accelerator import tpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MAKERS: list[Callable[[], object]] = [
    XLAAccelerator,
    tpu,
    SingleDeviceXLAStrategy,
    XLAStrategy,
    XLAFSDPStrategy,
    XLASPMDStrategy,
    XLALauncher,
    XLAEnvironment,
    XLAPrecision,
    XLACheckpointIO,
    XLAShardedCheckpointIO,
]
XLA = [torch.device("xla", index) for index in range(4)]
PLAN = PrecisionPlan(
    parameter=torch.float32, compute=torch.float32, reduction=torch.float32, output=torch.float32, scaler="none"
)


def distribution(folder: Path, version: str, code: str = "raise AssertionError('imported')") -> None:
    """A distribution torch_xla that holds nothing but ``code``."""
    (folder / "torch_xla").mkdir()
    (folder / "torch_xla" / "__init__.py").write_text(code)
    info = folder / f"torch_xla-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_xla\nVersion: {version}\n")


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder at the front of sys.path; what was loaded from it is forgotten."""
    if find_spec("torch_xla") is not None:
        pytest.skip("the real torch_xla is installed here; test_conformance_xla runs on it")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    load_module.cache_clear()
    sys.modules.pop("torch_xla", None)


@pytest.fixture
def right_pair(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_xla of this torch's version is there; four devices of the CPU runtime."""
    distribution(on_path, torch.__version__.partition("+")[0])
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")


def refused(pattern: str, make: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(MisconfigurationException, match=pattern):
        make(*args, **kwargs)


# --------------------------------------------------------------------------------------------------- the library


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch_xla is installed")
@pytest.mark.parametrize("make", MAKERS)
def test_without_torch_xla_the_error_names_the_command_to_install_it(make: Callable[[], object]) -> None:
    with pytest.raises(
        MissingPackage, match=r"needs torch_xla, which is not installed\. Run: pip install 'fulmen\[xla\]'"
    ):
        make()


@pytest.mark.parametrize("make", MAKERS)
def test_a_torch_xla_for_another_torch_is_refused_without_importing_it(
    on_path: Path, make: Callable[[], object]
) -> None:
    distribution(on_path, "1.99.0")

    with pytest.raises(BackendUnavailable) as caught:
        make()

    text = str(caught.value)
    assert f"torch {torch.__version__} and torch_xla 1.99.0" in text
    assert "pip install 'torch==1.99.*' 'torch_xla==1.99.*'" in text
    assert "torch_xla" not in sys.modules


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [("2.9.1", "2.9.0", True), ("2.9.1+cpu", "2.9.0", True), ("2.13.0", "2.9.0", False), ("2.9.0", "2.90.0", False)],
)
def test_a_pair_fits_when_major_and_minor_are_equal(ours: str, theirs: str, fits: bool) -> None:
    if fits:
        check_pair("a test", ours, theirs)
        return
    with pytest.raises(BackendUnavailable, match="a test found torch"):
        check_pair("a test", ours, theirs)


def test_a_torch_xla_that_cannot_be_loaded_is_one_clear_error(on_path: Path) -> None:
    own = torch.__version__.partition("+")[0]
    distribution(on_path, own, "raise ImportError('undefined symbol: _ZN5torch8autograd10deleteNodeE')")

    with pytest.raises(BackendUnavailable, match=r"cannot be loaded with torch .*undefined symbol.*as one pair"):
        load_module("torch_xla")


def test_every_backend_is_registered_by_name(right_pair: None) -> None:
    for name in ("xla", "tpu"):
        assert load(ACCELERATORS, name).name() == name
    kinds = {name: type(load(STRATEGIES, name)).__name__ for name in ("single_xla", "xla", "xla_fsdp", "xla_spmd")}
    assert list(kinds.values()) == ["SingleDeviceXLAStrategy", "XLAStrategy", "XLAFSDPStrategy", "XLASPMDStrategy"]
    debugging: Any = load(STRATEGIES, "xla_debug")
    assert debugging.debug
    assert isinstance(load(LAUNCHERS, "xla"), XLALauncher)
    assert isinstance(load(CLUSTER_ENVIRONMENTS, "xla"), XLAEnvironment)
    assert isinstance(load(CHECKPOINT_IOS, "xla"), XLACheckpointIO)
    assert set(dir(fulmen_xla)) == set(fulmen_xla.__all__)


# --------------------------------------------------------------------------------------------------- devices


@pytest.mark.proves("2.11")
@pytest.mark.parametrize(
    ("devices", "ids"),
    [(1, [0]), ("1", [0]), (4, [0, 1, 2, 3]), ("4", [0, 1, 2, 3]), (-1, [0, 1, 2, 3]), ("auto", [0, 1, 2, 3]),
     ([2], [2]), ("3,", [3]), ([0, 1, 2, 3], [0, 1, 2, 3])],
)  # fmt: skip
def test_a_run_has_one_device_or_all(right_pair: None, devices: Any, ids: list[int]) -> None:
    accelerator = XLAAccelerator()

    assert accelerator.parse_devices(devices) == ids
    assert accelerator.get_parallel_devices(ids) == [XLA[index] for index in ids]
    assert accelerator.auto_device_count() == 4


@pytest.mark.proves("2.11")
@pytest.mark.parametrize(
    ("devices", "why"),
    [
        (2, r"devices=2 for accelerator 'xla'.*one device of this machine or all 4.*Pass 1, 4, 'auto' or \[i\]"),
        (0, r"devices=0 .*Pass 1, 4"),
        ([0, 1], r"devices=\[0, 1\] names 2 devices.*a list names one"),
        ([4], r"devices=\[4\] names a device that is not there.*i from 0 to 3"),
        ("two", r"devices='two' is not understood"),
    ],
)
def test_any_other_number_is_refused(right_pair: None, devices: Any, why: str) -> None:
    refused(why, XLAAccelerator().parse_devices, devices)


TPUS = """
import sys
sys.modules[f"{__name__}._internal"] = sys.modules[f"{__name__}._internal.tpu"] = sys.modules[__name__]
def num_available_devices():
    return 4
"""


@pytest.mark.proves("3.3")
@pytest.mark.parametrize("vendor", ["0x10de", "0x1ae0"])
def test_torch_xla_is_imported_to_look_for_tpus_only_where_a_device_of_their_vendor_is_on_the_bus(
    on_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str
) -> None:
    distribution(on_path, torch.__version__.partition("+")[0], TPUS)
    bus = on_path / "devices"
    (bus / "0000:00:04.0").mkdir(parents=True)
    (bus / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr("fulmen_xla._library.PCI_DEVICES", bus)
    monkeypatch.delenv("PJRT_DEVICE", raising=False)

    has_tpus = vendor == "0x1ae0"
    assert [one.is_available() for one in (XLAAccelerator(), tpu())] == [has_tpus, has_tpus]
    assert tpu().auto_device_count() == (4 if has_tpus else 0)
    assert ("torch_xla" in sys.modules) == has_tpus
    for name in ("torch_xla._internal", "torch_xla._internal.tpu"):
        sys.modules.pop(name, None)


def test_tpu_is_available_only_where_the_runtime_runs_on_one(right_pair: None) -> None:
    assert XLAAccelerator().is_available()
    assert not tpu().is_available()
    assert tpu().auto_device_count() == 0


@pytest.mark.proves("4.1", "4.3")
@pytest.mark.parametrize(
    ("asked", "processes", "name"),
    [("auto", 1, "single_xla"), ("auto", 4, "xla"), ("fsdp", 4, "xla_fsdp"), ("xla_spmd", 4, "xla_spmd")],
)
def test_the_accelerator_chooses_the_strategy(right_pair: None, asked: str, processes: int, name: str) -> None:
    assert XLAAccelerator().choose_strategy(asked, processes) == name


@pytest.mark.proves("4.4")
def test_a_strategy_for_other_devices_is_refused(right_pair: None) -> None:
    class Other:
        pass

    refused(
        r"strategy Other cannot drive accelerator 'xla'.*'single_xla'.*'xla_spmd'",
        XLAAccelerator().check_strategy,
        Other(),
    )
    XLAAccelerator().check_strategy(XLAStrategy())


# --------------------------------------------------------------------------------------------------- strategies


def test_devices_of_another_kind_are_refused(right_pair: None) -> None:
    for strategy in (SingleDeviceXLAStrategy(), XLAStrategy(), XLAFSDPStrategy(), XLASPMDStrategy()):
        refused(
            r"drives XLA devices, but the run has cpu.*accelerator='tpu'",
            strategy.check_world,
            [torch.device("cpu")],
            1,
        )
    refused(r"drives XLA devices, but the run has cpu", SingleDeviceXLAStrategy, "cpu")


@pytest.mark.proves("4.31", "4.32")
def test_replicas_that_would_be_threads_are_refused(right_pair: None) -> None:
    for strategy in (XLAStrategy(), XLAFSDPStrategy()):
        refused(
            r"with 4 devices of PJRT's CPU runtime.*threads of one process.*'xla_spmd'", strategy.check_world, XLA, 1
        )
        strategy.check_world(XLA[:1], 1)


@pytest.mark.proves("3.3", "3.16")
@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed", "64-true", "transformer-engine"])
def test_precisions_that_xla_devices_have_not_are_refused_by_name(right_pair: None, name: Any) -> None:
    for strategy in (SingleDeviceXLAStrategy(), XLAStrategy(), XLAFSDPStrategy(), XLASPMDStrategy()):
        refused(
            rf"precision='{name}' with strategy \w+: XLA devices train in '32-true', '16-true', 'bf16-true'",
            strategy.own_precision,
            name,
        )
    refused(rf"precision='{name}' is not for XLA devices\..*Allowed: '32-true'", XLAPrecision, name)


def test_a_precision_object_that_scales_losses_is_refused(right_pair: None) -> None:
    scaled = PrecisionPlan(**{**PLAN, "scaler": "dynamic"})
    double = PrecisionPlan(**{**PLAN, "compute": torch.float64})

    for strategy in (SingleDeviceXLAStrategy(), XLAStrategy(), XLASPMDStrategy()):
        refused(
            r"got a precision that scales losses, which XLA devices cannot.*'bf16-true'",
            strategy.check_precision,
            scaled,
        )
        refused("computes in float64", strategy.check_precision, double)
        strategy.check_precision(PLAN)
    refused("scales losses", XLAFSDPStrategy().apply_precision_plan, scaled)


@pytest.mark.proves("3.3", "3.16")
@pytest.mark.parametrize(
    ("name", "dtype"), [("32-true", torch.float32), ("16-true", torch.float16), ("bf16-true", torch.bfloat16)]
)
def test_the_strategies_choose_xla_s_precision(right_pair: None, name: Any, dtype: torch.dtype) -> None:
    for strategy in (SingleDeviceXLAStrategy(), XLAStrategy(), XLAFSDPStrategy(), XLASPMDStrategy()):
        precision = strategy.own_precision(name)
        assert isinstance(precision, XLAPrecision)
        assert precision.plan()["parameter"] == precision.plan()["compute"] == dtype


def test_an_argument_of_the_wrong_kind_names_itself_and_what_is_right(right_pair: None) -> None:
    refused(r"XLASPMDStrategy\(data_parallel_size=0\) is not a whole number", XLASPMDStrategy, data_parallel_size=0)
    refused(r"XLASPMDStrategy\(state_dict_type='parts'\): use 'full'", XLASPMDStrategy, state_dict_type="parts")
    refused(r"XLASPMDStrategy\(auto_wrap_policy=3\) is neither a set", XLASPMDStrategy, auto_wrap_policy=3)
    refused(r"XLAFSDPStrategy\(state_dict_type='parts'\): use 'full'", XLAFSDPStrategy, state_dict_type="parts")
    refused(r"flatten_parameters=True", XLAFSDPStrategy, flatten_parameters=True)
    refused(
        r"activation_checkpointing_policy= and auto_wrapper_callable=",
        XLAFSDPStrategy,
        activation_checkpointing_policy={torch.nn.Linear},
        auto_wrapper_callable=print,
    )
    refused(r"precision='bf16-true'\) is a name\. Pass XLAPrecision", XLAStrategy, precision="bf16-true")
    refused(r"precision= and precision_plugin=", XLAStrategy, precision=XLAPrecision(), precision_plugin=XLAPrecision())
    refused(r"start_method='teleport' of XLALauncher", XLALauncher, "teleport")


def test_spmd_refuses_several_machines_and_a_mesh_that_does_not_come_out_even(right_pair: None) -> None:
    strategy = XLASPMDStrategy(data_parallel_size=3)
    strategy.take_devices(XLA)

    refused(
        r"XLASPMDStrategy\(data_parallel_size=3\) does not divide the 4 device.*1, 2, 4",
        strategy.check_world,
        XLA[:1],
        1,
    )
    refused(r"'xla_spmd' with num_nodes=2", strategy.check_world, XLA[:1], 2)
    for one_process in (strategy, SingleDeviceXLAStrategy()):
        refused(
            "runs in one process, but the run has 2", one_process.setup_environment, Topology((XLA[0],), world_size=2)
        )


@pytest.mark.proves("4.32")
def test_fsdp_refuses_value_clipping_optimizers_of_whole_parameters_and_whole_checkpoints_of_several_hosts(
    right_pair: None,
) -> None:
    strategy, model = XLAFSDPStrategy(state_dict_type="full"), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    refused(
        r"gradient_clip_val=0\.5 with gradient_clip_algorithm='value'", strategy.clip_grad_value, model, optimizer, 0.5
    )
    refused(
        r"SGD holds parameters that strategy 'xla_fsdp' has replaced.*setup_optimizers",
        strategy.prepare_optimizers,
        model,
        [optimizer],
    )
    refused(r"state_dict_type='full'\) with num_nodes=2", strategy.check_world, XLA[:1], 2)


def test_devices_are_unknown_before_the_environment_is_set_up(right_pair: None) -> None:
    for strategy in (SingleDeviceXLAStrategy(), XLAStrategy(), XLAFSDPStrategy(), XLASPMDStrategy()):
        with pytest.raises(RuntimeError, match="setup_environment"):
            _ = strategy.root_device


# --------------------------------------------------------------------------------------------------- environment, lau


@pytest.mark.proves("4.43")
def test_before_the_replicas_have_started_there_is_one_process(
    right_pair: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    environment = XLAEnvironment()

    assert not XLAEnvironment.detect()
    assert not environment.creates_processes_externally
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (1, 0, 0)
    assert environment.node_rank() == 2
    assert (environment.main_address, environment.main_port) == ("127.0.0.1", 12355)
    monkeypatch.setenv("MASTER_PORT", "none")
    with pytest.raises(MisconfigurationException, match="MASTER_PORT='none' is not a port"):
        _ = environment.main_port


@pytest.mark.proves("4.43")
def test_another_number_of_hosts_than_the_tpu_has_is_refused(right_pair: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")

    refused(
        r"num_nodes=1, but TPU_WORKER_HOSTNAMES names 4 hosts: set num_nodes=4",
        XLAEnvironment().validate_settings,
        4,
        1,
    )
    XLAEnvironment().validate_settings(4, 4)


def test_the_launcher_starts_all_devices_or_none(right_pair: None) -> None:
    place = {"num_nodes": 1, "node_rank": 0, "main_address": "127.0.0.1", "main_port": 1}

    assert XLALauncher().launch(lambda: 7, num_processes=1, **place) == 7
    refused(
        r"2 processes were asked for on a host with 4 XLA devices", XLALauncher().launch, int, num_processes=2, **place
    )
    assert (XLALauncher().is_interactive_compatible, XLALauncher("spawn").is_interactive_compatible) == (True, False)
