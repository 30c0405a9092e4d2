"""On the real torch-xla, four devices as one (SPMD). `nox -s xla` runs this, with CPU_NUM_DEVICES=4."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.nn import functional as F

from fulmen_conformance import CheckpointIOConformance, StrategyConformance
from fulmen_protocols import CheckpointError, MisconfigurationException, Topology
from fulmen_xla import SingleDeviceXLAStrategy, XLAAccelerator, XLAShardedCheckpointIO, XLASPMDStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fulmen_protocols import CheckpointIO, Strategy

if find_spec("torch_xla") is None or os.environ.get("CPU_NUM_DEVICES") != "4":
    pytest.skip("needs torch_xla, PJRT_DEVICE=CPU and CPU_NUM_DEVICES=4", allow_module_level=True)

DEVICE = torch.device("xla", 0)


def spread(tensor: torch.Tensor) -> str:
    """How torch-xla has spread a tensor; empty where it is not."""
    import torch_xla

    return str(torch_xla._XLAC._get_xla_sharding_spec(tensor))


class TestXLASPMDStrategy(StrategyConformance):
    @pytest.fixture
    def device(self) -> torch.device:
        return DEVICE

    @pytest.fixture
    def tolerance(self) -> float:
        # XLA compiles plain PyTorch's steps, which nobody cuts, as one program: the last bits are rounded otherwise.
        return 1e-6

    @pytest.fixture
    def strategy(self) -> Strategy:
        return XLASPMDStrategy()


class TestXLAShardedCheckpointIO(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return XLAShardedCheckpointIO()


@pytest.fixture
def strategy() -> Iterator[XLASPMDStrategy]:
    made = XLASPMDStrategy(auto_wrap_policy={nn.Linear}, data_parallel_size=2)
    made.take_devices([torch.device("xla", index) for index in range(4)])
    made.setup_environment(Topology((DEVICE,)))
    yield made
    made.teardown()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def trained(strategy: XLASPMDStrategy, steps: int = 2) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    module = network()
    placed = strategy.place(module)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    batches = [(torch.randn(8, 8), torch.randn(8, 4)) for _ in range(steps)]
    for x, y in strategy.process_loader(batches):  # type: ignore[misc]
        assert spread(x)
        F.mse_loss(placed(x), y).backward()
        strategy.optimizer_step(optimizer, placed)
        optimizer.zero_grad()
    return module, placed, optimizer


def test_parameters_and_what_the_optimizer_keeps_for_them_are_spread(strategy: XLASPMDStrategy) -> None:
    module, placed, optimizer = trained(strategy)

    assert strategy.mesh.mesh_shape == (2, 2)
    assert all(spread(parameter) for parameter in module.parameters())
    for parameter, kept in optimizer.state.items():
        assert spread(kept["exp_avg"]) == spread(kept["exp_avg_sq"]) == spread(parameter)
    assert list(strategy.module_state(placed, full=True)) == list(network().state_dict())


@pytest.mark.parametrize("full", [True, False])
def test_a_loaded_state_is_spread_again(strategy: XLASPMDStrategy, full: bool) -> None:
    _, placed, optimizer = trained(strategy)
    module, other, other_optimizer = trained(strategy, steps=1)
    expected = strategy.module_state(placed, full=True)

    strategy.load_module_state(other, strategy.module_state(placed, full=full), strict=True)
    strategy.load_optimizer_state(other, other_optimizer, strategy.optimizer_state(placed, optimizer, full=full))

    assert all(spread(parameter) for parameter in module.parameters())
    for kept in other_optimizer.state.values():
        assert spread(kept["exp_avg"])
    for name, value in strategy.module_state(other, full=True).items():
        assert torch.equal(value, expected[name]), name  # type: ignore[call-overload]


def test_shards_are_saved_by_torch_xla_s_planner_and_read_by_torch_anywhere(
    strategy: XLASPMDStrategy, tmp_path: Path
) -> None:
    _, placed, optimizer = trained(strategy)
    module, other, _ = trained(strategy, steps=1)
    io = XLAShardedCheckpointIO()
    expected = strategy.module_state(placed, full=True)
    saved = {
        "state_dict": strategy.module_state(placed, full=False),
        "optimizer": strategy.optimizer_state(placed, optimizer, full=False),
        "epoch": 3,
        "hyper": {"names": ["a", "b"], "pair": (1, None)},
    }

    io.save_sharded(saved, tmp_path / "c")
    read = io.load_checkpoint(tmp_path / "c")
    into = {"state_dict": strategy.module_state(other, full=False)}
    placed_again = io.load_sharded(tmp_path / "c", into)

    assert (read["epoch"], read["hyper"]) == (3, {"names": ["a", "b"], "pair": (1, None)})
    index = dcp.FileSystemReader(tmp_path / "c").read_metadata().state_dict_metadata
    assert max(len(entry.chunks) for entry in index.values()) >= 2, "no tensor was saved in shards"  # type: ignore[union-attr]
    for name, value in expected.items():
        assert torch.equal(read["state_dict"][name], value), name  # type: ignore[index, call-overload]
        assert torch.equal(strategy.module_state(other, full=True)[name], value), name  # type: ignore[call-overload]
    assert all(spread(parameter) for parameter in module.parameters())
    assert placed_again["epoch"] == 3
    assert not list(tmp_path.glob(".*")), "a stage was left behind"
    with pytest.raises(CheckpointError, match="is a URL"):
        io.save_sharded(saved, "s3://bucket/c")
    with pytest.raises(CheckpointError, match=r"of shape \[16, 8\] where the model has one of \[3, 3\]"):
        io.load_sharded(tmp_path / "c", {"state_dict": {"0.weight": torch.zeros(3, 3)}})


def test_the_numbers_are_those_of_one_device(strategy: XLASPMDStrategy) -> None:
    torch.manual_seed(5)
    batches = [(torch.randn(6, 8), torch.randn(6, 4)) for _ in range(4)]  # six samples do not divide by four devices
    module = network()
    placed = strategy.place(module)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    losses = []
    for x, y in strategy.process_loader(batches):  # type: ignore[misc]
        optimizer.zero_grad()
        loss = F.mse_loss(placed(x), y)
        loss.backward()
        strategy.optimizer_step(optimizer, placed)
        losses.append(float(loss.detach()))

    plain = network()
    optimizer = torch.optim.Adam(plain.parameters(), 0.01)
    expected = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(plain(x), y)
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_process_that_drives_all_devices_cannot_drive_one(strategy: XLASPMDStrategy) -> None:
    with pytest.raises(MisconfigurationException, match=r"'single_xla' drives one device.*torch-xla cannot undo"):
        SingleDeviceXLAStrategy().setup_environment(Topology((DEVICE,)))


def test_fewer_devices_than_the_machine_has_are_refused() -> None:
    made: Any = XLASPMDStrategy()
    made.take_devices(XLAAccelerator().get_parallel_devices([0]))

    with pytest.raises(MisconfigurationException, match=r"drives every device.*which are 4, and devices=1"):
        made.setup_environment(Topology((DEVICE,)))
