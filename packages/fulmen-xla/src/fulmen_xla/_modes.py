"""The two modes of torch-xla's runtime: a process drives one device, or all of them as one (SPMD)."""

from __future__ import annotations

from fulmen_protocols.errors import MisconfigurationException
from fulmen_xla._library import library

__all__ = ["require_no_spmd", "start_spmd"]


def require_no_spmd(strategy: str) -> None:
    """Refuse a process that is in SPMD mode: torch-xla has no way back.

    Raises:
        MisconfigurationException: it is.
    """
    if library("runtime").is_spmd():
        raise MisconfigurationException(
            f"strategy {strategy!r} drives one device, but this process drives all of its devices as one (SPMD), which "
            "torch-xla cannot undo. Use strategy='xla_spmd', or a new process."
        )


def start_spmd() -> None:
    """Put this process into SPMD mode, once; tensors that are on the device already move with it."""
    runtime = library("runtime")
    if not runtime.is_spmd():
        runtime.use_spmd()
