"""DataParallelStrategy against torch's own DataParallel and a plain module; the work itself needs two GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulmen_protocols import (
    MisconfigurationException,
    SupportsBoundMethods,
    SupportsCollectives,
    SupportsDevices,
    SupportsLaunch,
    Topology,
    missing_members,
)
from fulmen_strategies import DataParallelStrategy

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean(dim=1)  # type: ignore[no-any-return]

    def where(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), float(x.device.index), device=x.device)


def topology(*devices: str) -> Topology:
    return Topology(devices=tuple(torch.device(device) for device in devices))


@pytest.mark.proves("4.33")
def test_it_is_one_process_with_several_devices_and_no_ranks() -> None:
    strategy = DataParallelStrategy()

    assert missing_members(SupportsDevices, strategy) == missing_members(SupportsBoundMethods, strategy) == []
    assert missing_members(SupportsLaunch, strategy)
    assert missing_members(SupportsCollectives, strategy), "without ranks there is no sampler"


def test_what_cannot_work_is_refused() -> None:
    strategy = DataParallelStrategy()
    with pytest.raises(RuntimeError, match="root_device of DataParallelStrategy is unknown until setup_environment"):
        _ = strategy.root_device
    with pytest.raises(MisconfigurationException, match="over GPUs, but the run has cpu: use strategy='ddp'"):
        strategy.setup_environment(topology("cpu"))
    with pytest.raises(MisconfigurationException, match="one process, but the run has 2: use strategy='ddp'"):
        strategy.setup_environment(Topology(devices=(torch.device("cpu"),) * 2, world_size=2))


@pytest.mark.cuda
@pytest.mark.proves("4.33")
@needs_two_gpus
def test_a_batch_is_scattered_over_the_devices_and_gradients_are_those_of_the_whole() -> None:
    strategy = DataParallelStrategy()
    strategy.take_devices([torch.device("cuda", 0), torch.device("cuda", 1)])
    strategy.setup_environment(topology("cuda:0"))
    module, plain = Net(), Net()
    placed: Any = strategy.place(module)
    x = torch.randn(6, 4)

    strategy.bind_method(placed, "loss")(x.to(strategy.root_device)).mean().backward()  # type: ignore[attr-defined]
    plain.loss(x).mean().backward()

    torch.testing.assert_close(module.layer.weight.grad.cpu(), plain.layer.weight.grad)  # type: ignore[union-attr]
    assert strategy.bind_method(placed, "where")(x.cuda()).tolist() == [0.0] * 3 + [1.0] * 3  # type: ignore[attr-defined]
    torch.testing.assert_close(placed(x.cuda()).cpu(), plain(x))
    assert list(module.state_dict()) == list(plain.state_dict())
    strategy.teardown()
