"""The GPU of Apple silicon, through Metal."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import torch

from fulmen_accelerators._devices import parse_device_ids
from fulmen_accelerators._psutil import host_stats
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["MPSAccelerator"]


class MPSAccelerator:
    """The one Metal device of an Apple machine, id 0. ``DISABLE_MPS=1`` in the environment turns it off."""

    def name(self) -> str:
        """``"mps"``."""
        return "mps"

    def is_available(self) -> bool:
        """Whether this is an arm machine on which torch finds Metal, and ``DISABLE_MPS`` is not ``1``."""
        if os.environ.get("DISABLE_MPS") == "1":
            return False
        arm = platform.processor() in ("arm", "arm64") or platform.machine() in ("arm64", "aarch64")
        return arm and torch.backends.mps.is_available()

    def auto_device_count(self) -> int:
        """One."""
        return 1

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        """Read a count of 1, the id list ``[0]``, either as text, -1 or ``"auto"``; always gives ``[0]``.

        Raises:
            TypeError: not a count, text or sequence of ids.
            ValueError: no device or another one than 0 is named, or this machine has none.
        """
        available = [0] if self.is_available() else []
        if devices == "auto":
            devices = self.auto_device_count()
        hint = " DISABLE_MPS=1 is set." if os.environ.get("DISABLE_MPS") == "1" else ""
        return parse_device_ids(devices, available, kind="MPS", hint=hint)

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        """``mps:i`` for each id."""
        return [torch.device("mps", index) for index in devices]

    def setup_device(self, device: torch.device) -> None:
        """Check that ``device`` is the Metal device; torch makes it ready at first use.

        Raises:
            ValueError: it is another kind of device.
        """
        if device.type != "mps":
            raise MisconfigurationException(f"accelerator 'mps' got device {str(device)!r}. Pass torch.device('mps').")

    def teardown(self) -> None:
        """Give cached memory back to the system."""
        if self.is_available():
            torch.mps.empty_cache()

    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        """Use of memory, processors (since the last call) and swap of the whole machine, in percent.

        Raises:
            MissingPackage: psutil is not installed.
        """
        return host_stats(("M1_vm_percent", "M1_percent", "M1_swap_percent"))
