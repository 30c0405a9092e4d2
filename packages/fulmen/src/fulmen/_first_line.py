"""The line with which a Trainer begins: what it uses, and which devices this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_protocols import ACCELERATORS, FulmenError, available, load

if TYPE_CHECKING:
    from fulmen_fabric import Assembly

__all__ = ["first_line"]


def first_line(assembly: Assembly) -> str:
    """Devices, strategy and precision in use, then what else could be used, then what ``"auto"`` chose."""
    others = [name for name in sorted(available(ACCELERATORS)) if name != "cpu" and _is_usable(name)]
    return " ".join(
        (
            f"running on {len(assembly.devices)} x {assembly.accelerator_name} with {assembly.strategy_name}, "
            f"{assembly.precision_name}; usable beside the CPU: {', '.join(others) or 'nothing'}.",
            *assembly.chosen,
        )
    )


def _is_usable(accelerator: str) -> bool:
    try:
        return load(ACCELERATORS, accelerator).is_available()
    except FulmenError:
        return False  # not installed, or broken: `fulmen plugins` says why
