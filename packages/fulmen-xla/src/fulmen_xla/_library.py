"""torch-xla itself: whether it is there and fits torch, and its modules, imported when a backend first needs them."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fulmen_protocols.errors import BackendUnavailable, MissingPackage

__all__ = ["PCI_DEVICES", "check_pair", "library", "load", "platform", "require"]

PCI_DEVICES = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"  # the vendor's number, which every TPU on the bus has


def require(who: str) -> None:
    """See that torch-xla is installed and made for this torch, without importing it.

    Raises:
        MissingPackage: it is not installed.
        BackendUnavailable: it was made for another torch.
    """
    if find_spec("torch_xla") is None:
        raise MissingPackage(f"{who} needs torch_xla, which is not installed. Run: pip install 'fulmen[xla]'")
    try:
        found = version("torch_xla")
    except PackageNotFoundError:  # a build of one's own, on the path without having been installed
        return
    check_pair(who, torch.__version__, found)


def check_pair(who: str, torch_version: str, xla_version: str) -> None:
    """Refuse a torch-xla of another minor version than torch: it would end in an undefined symbol, or worse.

    Raises:
        BackendUnavailable: they differ.
    """
    ours, theirs = _minor(torch_version), _minor(xla_version)
    if ours == theirs or not ours or not theirs:
        return
    raise BackendUnavailable(
        f"{who} found torch {torch_version} and torch_xla {xla_version}, and each torch_xla works with one torch: the "
        f"one of its own minor version. Run: pip install 'torch=={theirs}.*' 'torch_xla=={theirs}.*'"
    )


def _minor(text: str) -> str:
    match = re.match(r"\d+\.\d+", text)
    return "" if match is None else match[0]


# Any: torch_xla has no annotations.
@cache
def load(module: str = "torch_xla") -> Any:
    """Import a module of torch-xla.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch, or cannot be loaded here.
    """
    require(module)
    try:
        return import_module(module)
    except (ImportError, OSError, ValueError) as error:  # a symbol or a shared library is missing
        raise BackendUnavailable(
            f"torch_xla {_version()} is installed, but {module} cannot be loaded with torch {torch.__version__}: "
            f"{str(error).splitlines()[0]}. Install torch and torch_xla anew, as one pair of the same minor version."
        ) from error


def _version() -> str:
    try:
        return version("torch_xla")
    except PackageNotFoundError:
        return "(of unknown version)"


def library(module: str = "") -> Any:
    """A module below ``torch_xla``: ``library("core.xla_model")``."""
    return load(f"torch_xla.{module}" if module else "torch_xla")


def platform() -> str:
    """``"TPU"``, ``"CPU"``, ``"CUDA"`` ...: what PJRT runs on here. Does not start it.

    Without PJRT_DEVICE in the environment it is a TPU where there is one, else an empty text: torch-xla would fall back
    to its CPU runtime, which is for tests, and which nobody has asked for.
    """
    asked = os.environ.get("PJRT_DEVICE", "")
    if asked:
        return asked.partition("_")[0].upper()
    return "TPU" if _tpus() else ""


def _tpus() -> int:
    # Importing torch_xla replaces torch's clip_grad_norm_ and nn.GRU and sets PJRT_DEVICE: not without need.
    if not any(_vendor(device) == _GOOGLE for device in PCI_DEVICES.glob("*/vendor")):
        return 0
    try:
        return int(library("_internal.tpu").num_available_devices())
    except (ValueError, AssertionError, OSError, KeyError):  # what torch-xla raises where no TPU is set up
        return 0


def _vendor(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # unplugged meanwhile, or not for us to read
        return ""
