"""The host's processors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fulmen_accelerators._psutil import host_stats
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CPUAccelerator"]


class CPUAccelerator:
    """The CPU. ``n`` devices mean ``n`` processes, which share all cores."""

    def name(self) -> str:
        """``"cpu"``."""
        return "cpu"

    def is_available(self) -> bool:
        """Always."""
        return True

    def auto_device_count(self) -> int:
        """One process, not one per core: PyTorch uses all cores from one."""
        return 1

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        """Read a positive number of processes, as an int or as digits; ``"auto"`` stands for one.

        Raises:
            TypeError: neither an int nor text.
            ValueError: not a positive number.
        """
        count: object = devices
        if isinstance(devices, str):
            text = devices.strip()
            count = self.auto_device_count() if text == "auto" else int(text) if text.isdecimal() else None
        elif type(devices) is not int:
            raise MisconfigurationTypeError(
                f"devices={devices!r} is a {type(devices).__name__}; on the CPU it is the number of processes, "
                "for example devices=2."
            )
        if not isinstance(count, int) or count < 1:
            raise MisconfigurationException(
                f"devices={devices!r} is not a number of CPU processes. Pass 1 or more, for example devices=2."
            )
        return list(range(count))

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        """The same ``cpu`` for every process."""
        return [torch.device("cpu") for _ in devices]

    def setup_device(self, device: torch.device) -> None:
        """Check that ``device`` is the CPU; there is nothing to make ready.

        Raises:
            ValueError: it is another kind of device.
        """
        if device.type != "cpu":
            raise MisconfigurationException(f"accelerator 'cpu' got device {str(device)!r}. Pass torch.device('cpu').")

    def teardown(self) -> None:
        """Nothing was taken."""

    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        """Use of memory, processors (since the last call) and swap of the whole host, in percent.

        Raises:
            MissingPackage: psutil is not installed.
        """
        return host_stats(("cpu_vm_percent", "cpu_percent", "cpu_swap_percent"))
