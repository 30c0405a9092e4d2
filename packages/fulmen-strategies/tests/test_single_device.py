"""SingleDeviceStrategy beyond its conformance kit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fulmen_protocols import (
    MisconfigurationException,
    Strategy,
    SupportsBoundMethods,
    SupportsCollectives,
    SupportsLaunch,
    SupportsNoSync,
    Topology,
    missing_members,
)
from fulmen_strategies import SingleDeviceStrategy

CPU, META = torch.device("cpu"), torch.device("meta")


def test_it_offers_the_base_protocol_alone() -> None:
    strategy = SingleDeviceStrategy("cpu")

    assert isinstance(strategy, Strategy)
    for ability in (SupportsBoundMethods, SupportsCollectives, SupportsLaunch, SupportsNoSync):
        assert missing_members(ability, strategy) == missing_members(ability, None)


def test_a_given_device_wins_over_the_topology_and_survives_teardown() -> None:
    strategy = SingleDeviceStrategy("meta")
    strategy.setup_environment(Topology(devices=(CPU,)))
    assert strategy.root_device == META
    strategy.teardown()
    assert strategy.root_device == META


def test_the_device_is_unknown_before_setup_and_after_teardown() -> None:
    strategy = SingleDeviceStrategy()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="setup_environment"):
            _ = strategy.root_device
        strategy.setup_environment(Topology(devices=(CPU,)))
        assert strategy.root_device == CPU
        strategy.teardown()


@pytest.mark.proves("4.7")
def test_several_processes_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="2"):
        SingleDeviceStrategy().setup_environment(Topology(devices=(CPU, CPU), world_size=2))


@pytest.mark.proves("4.7")
def test_the_placed_module_is_the_module_on_the_device() -> None:
    module = nn.Linear(2, 2)

    assert SingleDeviceStrategy("meta").place(module) is module
    assert module.weight.device == META


@pytest.mark.proves("3.19")
def test_modules_are_created_on_the_device() -> None:
    with SingleDeviceStrategy("meta").module_context(empty=False):
        assert nn.Linear(2, 2).weight.device == META
    assert nn.Linear(2, 2).weight.device == CPU


@pytest.mark.proves("3.19")
def test_empty_modules_draw_no_random_numbers() -> None:
    before = torch.get_rng_state()

    with SingleDeviceStrategy("cpu").module_context(empty=True):
        module = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 3), nn.BatchNorm1d(3), nn.LSTM(2, 2))

    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in module.parameters())
    nn.Linear(4, 4)
    assert not torch.equal(torch.get_rng_state(), before)
