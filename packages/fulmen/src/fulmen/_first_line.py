"""The line with which a Trainer begins: what it uses, and which devices this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_protocols import ACCELERATORS, FulmenError, available, load

if TYPE_CHECKING:
    from fulmen_fabric import Assembly
    from fulmen_protocols import PrecisionPlan

__all__ = ["first_line"]


def first_line(assembly: Assembly) -> str:
    """Devices, strategy and precision in use, then what else could be used, then what ``"auto"`` chose."""
    used = assembly.accelerator_name
    others = [name for name in sorted(available(ACCELERATORS)) if name not in ("cpu", used) and _is_usable(name)]
    also = f"; also usable: {', '.join(others)}." if others else "; no accelerator was found." if used == "cpu" else "."
    return " ".join(
        (
            f"running on {len(assembly.devices)} x {used} with {assembly.strategy_name}, "
            f"{assembly.precision_name} ({_dtypes(assembly.precision.plan())}){also}",
            *assembly.chosen,
        )
    )


def _dtypes(plan: PrecisionPlan) -> str:
    """What is kept, computed and summed in which dtype, in words."""
    name = {key: str(value).removeprefix("torch.") for key, value in plan.items()}
    state = name.get("optimizer_state", name["parameter"])
    if {state, name["compute"], name["reduction"]} == {name["parameter"]}:
        return f"{state} throughout"
    return ", ".join(
        (
            f"parameters {name['parameter']}",
            f"optimizer state {state}",
            f"products {name['compute']}",
            f"gradients summed in {name['reduction']}",
            *(["losses scaled"] if plan["scaler"] == "dynamic" else []),
        )
    )


def _is_usable(accelerator: str) -> bool:
    try:
        return load(ACCELERATORS, accelerator).is_available()
    except FulmenError:
        return False  # not installed, or broken: `fulmen plugins` says why
