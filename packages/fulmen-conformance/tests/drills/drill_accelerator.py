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
