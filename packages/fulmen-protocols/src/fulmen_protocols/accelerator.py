"""Accelerator: one kind of device, how its devices are named, counted and made ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

__all__ = ["Accelerator", "SupportsDeviceStats", "SupportsStrategyChoice"]


@runtime_checkable
class Accelerator(Protocol):
    """A kind of device. Knows nothing about models, ranks or processes."""

    def name(self) -> str:
        """The name people pass as ``accelerator=``, for example ``"cuda"``."""
        ...

    def is_available(self) -> bool:
        """Whether at least one device can be used now. Must not initialise the device: processes may fork later."""
        ...

    def auto_device_count(self) -> int:
        """The number of devices that ``devices="auto"`` stands for."""
        ...

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        """Turn the user's ``devices=`` (never ``"auto"``) into device ids, checked against this machine.

        Raises:
            TypeError: ``devices`` has a type this accelerator does not take.
            ValueError: a device does not exist, is named twice, or none is named.
        """
        ...

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        """One ``torch.device`` per id; the process with local rank ``i`` uses entry ``i``."""
        ...

    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one of this process. Called once per process, before the model is placed."""
        ...

    def teardown(self) -> None:
        """Release what ``setup_device`` took. Calling it twice is allowed."""
        ...


@runtime_checkable
class SupportsDeviceStats(Protocol):
    """An accelerator that can report counters of a device."""

    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        """Counters by name, for example bytes of memory in use. May be slow; never called on the path of a batch."""
        ...


@runtime_checkable
class SupportsStrategyChoice(Protocol):
    """An accelerator whose devices not every strategy can drive."""

    def choose_strategy(self, asked: str, num_processes: int) -> str:
        """The name of the strategy to use where the user has asked for ``asked``, such as ``"auto"`` or ``"fsdp"``.

        ``num_processes`` counts one for each device of the run. What needs no other name comes back as it is.
        """
        ...

    def check_strategy(self, strategy: object) -> None:
        """Refuse a strategy that cannot drive these devices, before anything is started.

        Raises:
            ValueError: the message names the strategy, and those that can.
        """
        ...
