"""The kit for accelerators."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from fulmen_conformance._kit import Kit, need
from fulmen_protocols import Accelerator, SupportsDeviceStats, missing_members

__all__ = ["AcceleratorConformance"]


class AcceleratorConformance(Kit):
    """Proves an ``Accelerator``. Give the fixture ``accelerator``; on a machine without its devices most tests skip."""

    @pytest.fixture
    def accelerator(self) -> Accelerator:
        """The accelerator under test, new for each test."""
        raise NotImplementedError("define a fixture `accelerator` that returns the accelerator under test")

    @pytest.fixture
    def kit_here(self, accelerator: Accelerator) -> Accelerator:
        """The accelerator, where it has a device; elsewhere the test skips. Not to be replaced."""
        if not accelerator.is_available():
            pytest.skip(f"no {accelerator.name()} device on this machine")
        return accelerator

    def test_it_has_every_member_of_the_protocol(self, accelerator: Accelerator) -> None:
        """``Accelerator`` has no optional member. On failure look at the methods listed as missing."""
        assert missing_members(Accelerator, accelerator) == []

    def test_its_name_is_one_lower_case_word(self, accelerator: Accelerator) -> None:
        """People type it as ``accelerator=``. On failure look at ``name()``: spaces, capitals, a value that changes."""
        name = accelerator.name()

        assert name == name.lower().strip() != ""
        assert " " not in name
        assert accelerator.name() == name

    def test_availability_is_a_plain_bool_and_stays_the_same(self, accelerator: Accelerator) -> None:
        """Asked many times. On failure look at ``is_available()``: truthy values, a device that is opened and kept."""
        first = accelerator.is_available()

        assert type(first) is bool
        assert accelerator.is_available() is first

    def test_asking_initialises_no_device(self, accelerator: Accelerator) -> None:
        """Processes may be forked after the question. On failure look for calls that create a device context."""
        before = _initialised()

        accelerator.is_available()
        accelerator.auto_device_count()

        assert _initialised() == before

    def test_auto_stands_for_at_least_one_device_when_available(self, accelerator: Accelerator) -> None:
        """``devices="auto"`` must mean something. On failure look at ``auto_device_count()``."""
        count = accelerator.auto_device_count()

        assert type(count) is int
        assert count >= (1 if accelerator.is_available() else 0)

    def test_a_number_gives_that_many_different_devices(self, kit_here: Accelerator) -> None:
        """``devices=2`` is two devices. On failure look at ``parse_devices`` of an int."""
        for count in range(1, kit_here.auto_device_count() + 1):
            ids = kit_here.parse_devices(count)

            assert isinstance(ids, list), f"parse_devices({count}) gave {ids!r}, which is not a list"
            assert len(ids) == count
            assert len(set(ids)) == count
            assert all(type(i) is int and i >= 0 for i in ids)

    def test_a_number_as_text_means_the_number(self, kit_here: Accelerator) -> None:
        """Flags of a command line are text. On failure look at ``parse_devices("1")``."""
        assert kit_here.parse_devices("1") == kit_here.parse_devices(1)

    def test_a_list_of_ids_is_kept_or_refused_by_type(self, kit_here: Accelerator) -> None:
        """``devices=[0]`` names devices. On failure look at ``parse_devices`` of a list: order, offsets."""
        first = kit_here.parse_devices(1)
        try:
            got = kit_here.parse_devices(first)
        except TypeError:
            return  # an accelerator may take numbers only

        assert got == first

    @pytest.mark.parametrize("devices", [0, "0", []], ids=repr)
    def test_no_device_at_all_is_an_error(self, kit_here: Accelerator, devices: int | str | list[int]) -> None:
        """Nothing would run. On failure look at ``parse_devices`` of zero and of an empty list."""
        expected = (ValueError, TypeError) if isinstance(devices, list) else ValueError
        with pytest.raises(expected):
            kit_here.parse_devices(devices)

    @pytest.mark.parametrize("devices", [[0, 0], [10**6], [-7], "nonsense"], ids=repr)
    def test_a_device_that_cannot_be_used_is_an_error(
        self, kit_here: Accelerator, devices: int | str | list[int]
    ) -> None:
        """Named twice, or not there. On failure look at what ``parse_devices`` lets through."""
        with pytest.raises((ValueError, TypeError)) as caught:
            kit_here.parse_devices(devices)

        asked = str(devices[0]) if isinstance(devices, list) else str(devices)
        assert asked in str(caught.value), f"the message should show what was asked: {caught.value}"

    @pytest.mark.parametrize("devices", [1.5, None, object], ids=repr)
    def test_a_value_of_the_wrong_type_is_a_type_error(self, kit_here: Accelerator, devices: object) -> None:
        """Half a device does not exist. On failure look for ``int(devices)``, which rounds silently."""
        with pytest.raises(TypeError):
            kit_here.parse_devices(devices)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def test_there_is_one_torch_device_per_id(self, kit_here: Accelerator) -> None:
        """Local rank i uses entry i. On failure look at ``get_parallel_devices``."""
        ids = kit_here.parse_devices(kit_here.auto_device_count())

        devices = kit_here.get_parallel_devices(ids)

        assert len(devices) == len(ids)
        assert all(isinstance(device, torch.device) for device in devices)
        assert len({device.type for device in devices}) == 1
        numbers = [cast("int | None", device.index) for device in devices]
        indexed = [number for number in numbers if number is not None]
        assert indexed in ([], ids)

    def test_a_tensor_lives_on_a_device_that_was_set_up(self, kit_here: Accelerator) -> None:
        """The whole point. On failure look at ``setup_device`` and at the device ``get_parallel_devices`` names."""
        device = kit_here.get_parallel_devices(kit_here.parse_devices(1))[0]

        kit_here.setup_device(device)
        value = torch.ones(3, device=device) * 2

        assert value.device.type == device.type
        assert value.cpu().tolist() == [2.0, 2.0, 2.0]
        kit_here.teardown()

    def test_setting_up_draws_no_random_number(self, kit_here: Accelerator) -> None:
        """A seeded run must stay seeded. On failure look for ``manual_seed`` or draws in ``setup_device``."""
        device = kit_here.get_parallel_devices(kit_here.parse_devices(1))[0]
        torch.manual_seed(20_011)  # a seed that no accelerator chooses: seeding again must show
        before = torch.get_rng_state()

        kit_here.setup_device(device)
        kit_here.teardown()

        assert torch.equal(torch.get_rng_state(), before)

    def test_teardown_can_be_called_twice_and_set_up_again(self, kit_here: Accelerator) -> None:
        """Fit, then test, in one process. On failure look at what ``teardown`` releases a second time."""
        device = kit_here.get_parallel_devices(kit_here.parse_devices(1))[0]

        for _ in range(2):
            kit_here.setup_device(device)
            kit_here.teardown()
            kit_here.teardown()

    def test_device_stats_are_finite_numbers_by_name(self, kit_here: Accelerator) -> None:
        """They go to loggers as they are. On failure look at ``get_device_stats``: tensors, text, NaN, no entry."""
        need(kit_here, SupportsDeviceStats)
        assert isinstance(kit_here, SupportsDeviceStats)
        device = kit_here.get_parallel_devices(kit_here.parse_devices(1))[0]
        kit_here.setup_device(device)

        stats = kit_here.get_device_stats(device)

        assert stats
        for name, value in stats.items():
            assert isinstance(name, str)
            assert isinstance(value, (int, float)), f"{name} is {value!r}"
            assert math.isfinite(value), f"{name} is {value!r}"
        kit_here.teardown()


def _initialised() -> tuple[bool, bool]:
    return torch.cuda.is_initialized(), torch.xpu.is_initialized()  # type: ignore[no-untyped-call]
