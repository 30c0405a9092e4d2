"""A minimal correct accelerator, and broken ones that AcceleratorConformance must catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from fulmen_conformance import AcceleratorConformance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fulmen_protocols import Accelerator


class Good:
    """The CPU, with four numbered seats."""

    seats = 4

    def name(self) -> str:
        return "seats"

    def is_available(self) -> bool:
        return True

    def auto_device_count(self) -> int:
        return self.seats

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        if isinstance(devices, str):
            if not devices.isdigit():
                raise ValueError(f"devices is {devices!r}, which is not a number")
            devices = int(devices)
        ids = list(range(devices)) if isinstance(devices, int) else devices
        if not isinstance(ids, list):
            raise TypeError(f"devices is {devices!r}; give a number or a list")
        if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(self.seats)):
            raise ValueError(f"devices is {devices!r}; there are seats 0 to {self.seats - 1}")
        return ids

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cpu") for _ in devices]

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        return {"threads": torch.get_num_threads()}


class TestGood(AcceleratorConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def accelerator(self) -> Accelerator:
        return Good()


def broken(backend: type[Good], *tests: str) -> type[AcceleratorConformance]:
    """A subclass of the kit for ``backend``, which exactly ``tests`` must catch."""

    class Drill(AcceleratorConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def accelerator(self) -> Accelerator:
            return backend()

    return Drill


class NoTeardown(Good):
    teardown = None


class Truthy(Good):
    def is_available(self) -> int:
        return 1


class NoDevicesByDefault(Good):
    def auto_device_count(self) -> int:
        return 0


class OffByOne(Good):
    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        ids = super().parse_devices(devices)
        return [*ids, 99] if isinstance(devices, int) else ids


class LaxWithDuplicates(Good):
    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        return devices if isinstance(devices, list) and devices else super().parse_devices(devices)


class RoundsHalfDevices(Good):
    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        return super().parse_devices(int(devices) if isinstance(devices, float) else devices)


class ZeroMeansNothing(Good):
    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        return [] if devices in (0, "0", []) else super().parse_devices(devices)


class ReversesLists(Good):
    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        ids = super().parse_devices(devices)
        return [3 - i for i in ids] if isinstance(devices, list) else ids


class DevicesAsText(Good):
    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        return ["cpu" for _ in devices]


class OneDeviceForAll(Good):
    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cpu")]


class Seeds(Good):
    def setup_device(self, device: torch.device) -> None:
        torch.manual_seed(0)
        torch.rand(1)


class TearsDownOnce(Good):
    def __init__(self) -> None:
        self.held: list[torch.device] = []

    def setup_device(self, device: torch.device) -> None:
        self.held.append(device)

    def teardown(self) -> None:
        self.held.pop()


class StatsAsText(Good):
    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        return {"memory": "12 GiB"}


class NoStats(Good):
    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        return {}


TestNoTeardown = broken(
    NoTeardown,
    "test_it_has_every_member_of_the_protocol",
    "test_a_tensor_lives_on_a_device_that_was_set_up",
    "test_setting_up_draws_no_random_number",
    "test_teardown_can_be_called_twice_and_set_up_again",
    "test_device_stats_are_finite_numbers_by_name",
)
TestTruthy = broken(Truthy, "test_availability_is_a_plain_bool_and_stays_the_same")
TestNoDevicesByDefault = broken(
    NoDevicesByDefault,
    "test_auto_stands_for_at_least_one_device_when_available",
    "test_there_is_one_torch_device_per_id",
)
TestOffByOne = broken(
    OffByOne,
    "test_a_number_gives_that_many_different_devices",
    "test_a_number_as_text_means_the_number",
    "test_a_list_of_ids_is_kept_or_refused_by_type",
)
TestLaxWithDuplicates = broken(LaxWithDuplicates, "test_a_device_that_cannot_be_used_is_an_error")
TestRoundsHalfDevices = broken(RoundsHalfDevices, "test_a_value_of_the_wrong_type_is_a_type_error")
TestZeroMeansNothing = broken(ZeroMeansNothing, "test_no_device_at_all_is_an_error")
TestReversesLists = broken(ReversesLists, "test_a_list_of_ids_is_kept_or_refused_by_type")
TestDevicesAsText = broken(
    DevicesAsText, "test_there_is_one_torch_device_per_id", "test_a_tensor_lives_on_a_device_that_was_set_up"
)
TestOneDeviceForAll = broken(OneDeviceForAll, "test_there_is_one_torch_device_per_id")
TestSeeds = broken(Seeds, "test_setting_up_draws_no_random_number")
TestTearsDownOnce = broken(TearsDownOnce, "test_teardown_can_be_called_twice_and_set_up_again")
TestStatsAsText = broken(StatsAsText, "test_device_stats_are_finite_numbers_by_name")
TestNoStats = broken(NoStats, "test_device_stats_are_finite_numbers_by_name")
