"""Finding and importing DeepSpeed, late and for the right kind of device."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from fulmen_protocols.errors import BackendUnavailable, MissingPackage

__all__ = ["OLDEST", "deepspeed_for", "require_deepspeed", "submodule"]

OLDEST = (0, 16)
"""The first DeepSpeed that works with torch 2.6, whose ``torch.load`` takes weights only."""
_INSTALL = "pip install 'fulmen[deepspeed]'"


def require_deepspeed() -> None:
    """See that DeepSpeed is installed and new enough, without importing it.

    Raises:
        MissingPackage: it is not there, or too old; the message has the command.
    """
    if find_spec("deepspeed") is None:
        raise MissingPackage(f"DeepSpeedStrategy needs deepspeed, which is not installed. Run: {_INSTALL}")
    try:
        found = version("deepspeed")
    except PackageNotFoundError:  # a source tree on the path
        return
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        raise MissingPackage(
            f"DeepSpeedStrategy needs deepspeed >= {'.'.join(map(str, OLDEST))}: older ones cannot read their own "
            f"checkpoints with torch >= 2.6. Version {found} is installed. Run: {_INSTALL} --upgrade"
        )


# Any: DeepSpeed has no type information.
def deepspeed_for(device_type: str, logging_level: int) -> Any:
    """Import DeepSpeed, made to drive devices of this kind.

    Raises:
        BackendUnavailable: it was imported before, and drives another kind; it can change no more in this process.
    """
    if "deepspeed" not in sys.modules:
        # Otherwise a machine with a GPU would have DeepSpeed drive it also for accelerator="cpu".
        os.environ.setdefault("DS_ACCELERATOR", device_type)
    module: Any = importlib.import_module("deepspeed")
    driven = module.accelerator.get_accelerator().device_name()
    if driven != device_type:
        raise BackendUnavailable(
            f"this run is on {device_type!r}, but DeepSpeed drives {driven!r} in this process already. Start a new "
            f"process, or set DS_ACCELERATOR={device_type}."
        )
    submodule("deepspeed.utils").logger.setLevel(logging_level)
    # DeepSpeed calls these at every step; torch would say so every time.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    return module


def submodule(name: str) -> Any:
    """A module of DeepSpeed by its full name."""
    return importlib.import_module(name)
