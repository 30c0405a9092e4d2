"""NVIDIA GPUs, and AMD ones under torch's ROCm build.

Counting never touches the CUDA runtime where the driver's management library (NVML) answers, so that processes can
still be forked afterwards; no environment variable is read or written for it.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

import torch

from fulmen_accelerators._devices import parse_device_ids
from fulmen_protocols import BackendUnavailable, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CUDAAccelerator", "find_usable_cuda_devices"]

_log = logging.getLogger(__name__)


class CUDAAccelerator:
    """CUDA devices by the ids torch gives them, which start at 0 among those of ``CUDA_VISIBLE_DEVICES``."""

    def name(self) -> str:
        """``"cuda"``."""
        return "cuda"

    def is_available(self) -> bool:
        """Whether at least one device is visible. Does not start CUDA (on MIG slices and without NVML, torch must)."""
        return torch.cuda.device_count() > 0

    def auto_device_count(self) -> int:
        """All visible devices; in an interactive session 1, as several would need processes that can't be started."""
        count = torch.cuda.device_count()
        if count > 1 and _is_interactive():
            _log.info("devices='auto' takes 1 of %d CUDA devices, because this session is interactive.", count)
            return 1
        return count

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        """Read a count, a sequence of ids, or either as text; -1 and ``"auto"`` stand for all.

        ``"3"`` is a count and ``"3,"`` an id. Under torchrun with one visible device per process, ids are not checked
        against the machine: the other processes' devices cannot be seen from here.

        Raises:
            TypeError: not a count, text or sequence of ids.
            ValueError: no device is named, one is named twice, or one does not exist.
        """
        if devices == "auto":
            devices = self.auto_device_count()
        available = list(range(torch.cuda.device_count()))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" CUDA_VISIBLE_DEVICES={visible!r} limits them."
        return parse_device_ids(
            devices, available, kind="CUDA", hint=hint, unchecked=_sees_one_of_several(len(available))
        )

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        """``cuda:i`` for each id; ``cuda:0`` for all where every process sees only a device of its own."""
        count = torch.cuda.device_count()
        if _sees_one_of_several(count) and any(index >= count for index in devices):
            return [torch.device("cuda", 0) for _ in devices]
        return [torch.device("cuda", index) for index in devices]

    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` current, which starts CUDA in this process, and log its name. Writes no environment variable.

        Raises:
            ValueError: it is another kind of device.
            RuntimeError: CUDA cannot use it.
        """
        if device.type != "cuda":
            raise MisconfigurationException(
                f"accelerator 'cuda' got device {str(device)!r}. Pass torch.device('cuda', 0)."
            )
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        _log.info("this process uses %s, %s (CUDA_VISIBLE_DEVICES: %s).", device, name, visible)
        if torch.cuda.get_device_capability(device) >= (8, 0):
            _hint_at_tensor_cores(name)

    def teardown(self) -> None:
        """Free cuBLAS workspaces and cached memory."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        # torch has no public way to free the workspaces; without it they stay until the process ends.
        clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # pyright: ignore[reportPrivateUsage]
        if clear_workspaces is not None:
            clear_workspaces()
        torch.cuda.empty_cache()

    def get_device_stats(self, device: torch.device) -> Mapping[str, float]:
        """The caching allocator's counters, ``torch.cuda.memory_stats``; sizes in bytes."""
        return {name: float(value) for name, value in torch.cuda.memory_stats(device).items()}


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Ids of visible devices on which memory can be allocated now, the lowest first.

    A device in exclusive mode that another process holds is passed over. Starts CUDA on every device it tries.

    Args:
        num_devices: how many to find; -1 for all usable ones, 0 for none.

    Raises:
        ValueError: more than are visible, or a negative number other than -1.
        RuntimeError: fewer than ``num_devices`` are usable.
    """
    visible = torch.cuda.device_count()
    if type(num_devices) is not int or num_devices < -1:
        raise MisconfigurationException(f"num_devices={num_devices!r} is not a number of devices. Pass -1 for all.")
    if num_devices > visible:
        raise MisconfigurationException(
            f"num_devices={num_devices} CUDA devices were asked for; {visible} are visible."
            + (f" Pass at most {visible}." if visible else "")
        )
    wanted = visible if num_devices == -1 else num_devices
    found: list[int] = []
    busy: list[int] = []
    for index in range(visible):
        if len(found) == wanted:
            break
        try:
            torch.zeros((), device=torch.device("cuda", index))
        except RuntimeError:  # in exclusive mode and held by another process, or out of memory
            busy.append(index)
        else:
            found.append(index)
    if num_devices != -1 and len(found) < num_devices:
        raise BackendUnavailable(
            f"num_devices={num_devices} CUDA devices were asked for; {len(found)} of {visible} visible ones are usable "
            f"and {', '.join(map(str, busy))} refused memory. Free them, or ask for fewer."
        )
    return found


def _sees_one_of_several(count: int) -> bool:
    """Whether torchrun started this process and some scheduler lets each process see one device only."""
    return count == 1 and torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


@cache  # once per process and kind of device
def _hint_at_tensor_cores(name: str) -> None:
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to tell once its newer per-backend setting was used: a choice was made
        return
    if highest:
        _log.info(
            "%s multiplies float32 matrices faster on its Tensor Cores, at lower precision: "
            "torch.set_float32_matmul_precision('high') allows it.",
            name,
        )
