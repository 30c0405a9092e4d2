"""Subclasses that switch tests of their kit off; each must fail `test_nothing_is_switched_off`, and no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from fulmen_conformance import AcceleratorConformance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_protocols import Accelerator

GUARD = {"test_nothing_is_switched_off"}


class Shouting:
    """A correct CPU accelerator but for its name."""

    def name(self) -> str:
        return "ACME"

    def is_available(self) -> bool:
        return True

    def auto_device_count(self) -> int:
        return 1

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        if devices in (1, "1", [0]) and not isinstance(devices, float):
            return [0]
        if isinstance(devices, (int, str, list)):
            raise ValueError(f"devices is {devices!r}")
        raise TypeError(f"devices is {devices!r}")

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cpu") for _ in devices]

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass


class Base(AcceleratorConformance):
    @pytest.fixture
    def accelerator(self) -> Accelerator:
        return Shouting()


class TestNotSwitchedOff(Base):
    caught_by: ClassVar[set[str]] = {"test_its_name_is_one_lower_case_word"}


class TestReplaced(Base):
    caught_by: ClassVar[set[str]] = GUARD

    def test_its_name_is_one_lower_case_word(self) -> None:
        pass


class TestSetToNone(Base):
    caught_by: ClassVar[set[str]] = GUARD
    test_its_name_is_one_lower_case_word = None


class TestSkipped(Base):
    caught_by: ClassVar[set[str]] = GUARD

    @pytest.mark.skip(reason="later")
    def test_its_name_is_one_lower_case_word(self) -> None:
        pass


class TestSkippedIf(Base):
    caught_by: ClassVar[set[str]] = GUARD

    @pytest.mark.xfail(reason="both marks")
    @pytest.mark.skipif(True, reason="always")
    def test_its_name_is_one_lower_case_word(self) -> None:
        pass


class TestXfailWithoutReason(Base):
    caught_by: ClassVar[set[str]] = GUARD

    @pytest.mark.xfail
    def test_its_name_is_one_lower_case_word(self) -> None:
        raise AssertionError


class TestXfailUnderACondition(Base):
    caught_by: ClassVar[set[str]] = GUARD

    @pytest.mark.xfail(False, reason="never, so the replacement counts")
    def test_its_name_is_one_lower_case_word(self) -> None:
        pass


class TestKitFixtureReplaced(Base):
    """Private fixtures of the kit are not the vendor's."""

    caught_by: ClassVar[set[str]] = GUARD | {"test_its_name_is_one_lower_case_word"}

    @pytest.fixture
    def kit_here(self) -> Accelerator:
        pytest.skip("no device")


class Between(Base):
    def test_its_name_is_one_lower_case_word(self) -> None:
        pass


class TestReplacedByABase(Between):
    caught_by: ClassVar[set[str]] = GUARD


class TestHonest(Base):
    caught_by: ClassVar[set[str]] = set()

    @pytest.mark.xfail(reason="the board's name is a trademark")
    def test_its_name_is_one_lower_case_word(self, accelerator: Accelerator) -> None:
        super().test_its_name_is_one_lower_case_word(accelerator)
