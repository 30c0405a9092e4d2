"""XLAAccelerator: the devices that torch-xla drives, TPUs among them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError
from fulmen_xla._library import library, platform, require, runtime_is_running, tpu_chips

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["XLAAccelerator", "tpu"]

_log = logging.getLogger(__name__)

_STRATEGIES = ("single_xla", "xla", "xla_debug", "xla_fsdp", "xla_spmd")
_COUNTS = {"CPU": "CPU_NUM_DEVICES", "CUDA": "GPU_NUM_DEVICES", "NEURON": "NEURONCORE_NUM_DEVICES"}


class XLAAccelerator:
    """Devices of the PJRT runtime: TPUs, or what PJRT_DEVICE names (its CPU runtime is good for tests).

    Args:
        only: the platform that counts as available, ``"TPU"`` for example; None: any.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
    """

    def __init__(self, only: str | None = None) -> None:
        self._only = only
        require(f"accelerator {self.name()!r}")

    def name(self) -> str:
        """``"xla"``, or the platform's own name where only that counts: ``"tpu"``."""
        return "xla" if self._only is None else self._only.lower()

    def is_available(self) -> bool:
        """Whether the runtime has a device of the platform. Does not start it: it could not be shared by a fork."""
        return (self._only is None or platform() == self._only) and self.auto_device_count() > 0

    def auto_device_count(self) -> int:
        """All devices of this machine; of a TPU its chips (or cores), else what the runtime's variables say."""
        kind = platform()
        if not kind or (self._only is not None and kind != self._only):
            return 0
        if kind == "TPU":
            return tpu_chips()
        variable = _COUNTS.get(kind, "")
        return int(os.environ.get(variable, "1")) if variable else 1

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        """Read one device (``1``), all of them (their count, -1, ``"auto"``) or a list with the id of one.

        torch-xla itself runs on one device of a machine or on all; there is nothing in between.

        Raises:
            TypeError: not a count, text or sequence of ids.
            ValueError: no device, some but not all, or one that does not exist.
        """
        asked = f"devices={devices!r}"
        count = self.auto_device_count()
        allowed = f"Pass 1, {count}, 'auto' or [i] with i from 0 to {count - 1}."
        if isinstance(devices, str):
            devices = _read(devices, count, asked, allowed)
        if type(devices) is int:
            if devices == -1:
                devices = count
            if devices not in (1, count) or devices < 1:
                raise MisconfigurationException(
                    f"{asked} for accelerator {self.name()!r}: a run has one device of this machine or all {count}. "
                    f"{allowed} (A TPU's variable TPU_VISIBLE_CHIPS, or CPU_NUM_DEVICES, changes what all is.)"
                )
            return list(range(devices))
        if not isinstance(devices, (list, tuple)):
            raise MisconfigurationTypeError(f"{asked} is a {type(devices).__name__}. {allowed}")
        ids = cast("Sequence[object]", devices)
        if any(type(one) is not int for one in ids):
            raise MisconfigurationTypeError(f"{asked} holds something else than integers. {allowed}")
        if len(ids) != 1 and list(ids) != list(range(count)):
            raise MisconfigurationException(
                f"{asked} names {len(ids)} devices of accelerator {self.name()!r}: a list names one. {allowed}"
            )
        if not all(0 <= cast("int", one) < count for one in ids):
            raise MisconfigurationException(f"{asked} names a device that is not there. {allowed}")
        return [cast("int", one) for one in ids]

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        """``xla:i`` for each id. No device is opened: the processes that use them may not have started yet."""
        return [torch.device("xla", index) for index in devices]

    def setup_device(self, device: torch.device) -> None:
        """Log what this process runs on. The strategy chooses the runtime's mode, so no device is opened yet.

        Raises:
            ValueError: it is another kind of device.
        """
        if device.type != "xla":
            raise MisconfigurationException(
                f"accelerator {self.name()!r} got device {str(device)!r}. Pass torch.device('xla', 0)."
            )
        library()  # which says what is wrong with the installation
        _log.info("this process uses %s of PJRT's %s runtime.", device, platform())

    def teardown(self) -> None:
        """Run what has been recorded and wait for it; the runtime itself stays until the process ends."""
        if runtime_is_running():
            library().sync()
            library("core.xla_model").wait_device_ops()

    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        """Memory of the device in MB where the runtime tells, and how much was compiled and run so far."""
        stats: dict[str, float] = {}
        try:
            memory: dict[str, Any] = library("core.xla_model").get_memory_info(device)
        except RuntimeError:  # the CPU runtime does not tell
            memory = {}
        if "bytes_limit" in memory:
            stats["avg. free memory (MB)"] = (memory["bytes_limit"] - memory["bytes_used"]) / 1e6
            stats["avg. peak memory (MB)"] = memory.get("peak_bytes_used", memory["bytes_used"]) / 1e6
        metrics = library("debug.metrics")
        for name, metric in (("graphs compiled", "CompileTime"), ("graphs run", "ExecuteTime")):
            data: Any = metrics.metric_data(metric)
            stats[name] = 0.0 if data is None else float(data[0])
        return stats

    def choose_strategy(self, asked: str, num_processes: int) -> str:
        """``single_xla`` or ``xla`` for ``"auto"``; ``"fsdp"`` is ``xla_fsdp`` here."""
        if asked == "auto":
            return "single_xla" if num_processes == 1 else "xla"
        return "xla_fsdp" if asked == "fsdp" else asked

    def check_strategy(self, strategy: object) -> None:
        """Refuse a strategy that is not for XLA: it would neither run what is recorded nor reduce a gradient.

        One that is says so by an attribute ``drives`` that holds ``"xla"``.

        Raises:
            MisconfigurationException: it is for other devices.
        """
        if getattr(strategy, "drives", None) != "xla":
            raise MisconfigurationException(
                f"strategy {type(strategy).__name__} cannot drive accelerator {self.name()!r}. "
                f"Use one of {', '.join(map(repr, _STRATEGIES))}, or 'auto'."
            )


def _read(text: str, count: int, asked: str, allowed: str) -> int | list[int]:
    if text.strip() == "auto":
        return count
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        return int(text)
    except ValueError:
        raise MisconfigurationException(f"{asked} is not understood. {allowed}") from None


def tpu() -> XLAAccelerator:
    """TPUs and no other device; what ``accelerator="tpu"`` makes."""
    return XLAAccelerator("TPU")
