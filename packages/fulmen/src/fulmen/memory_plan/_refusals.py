"""Errors of a plan's step and placement, in words that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from fulmen.module import LightningModule

__all__ = ["explained", "explained_place"]


def explained(error: Exception, module: LightningModule, batch: str) -> Exception:
    kind = type(error).__name__
    if isinstance(error, MisconfigurationException):
        return error
    if "DataDependent" in kind or "DynamicOutputShape" in kind:
        return MisconfigurationException(
            f"the training step of {type(module).__name__} reads a tensor's value ({error}), and a plan has none. "
            "Keep `.item()`, `if tensor:` and boolean masks out of it, or plan with example_input_array and no batch."
        )
    error.add_note(f"fulmen: in the plan's training step of {type(module).__name__}, with the batch {batch}")
    return error


def explained_place(error: Exception, strategy: object) -> Exception:
    if isinstance(error, MisconfigurationException):
        return error
    return MisconfigurationException(
        f"strategy={type(strategy).__name__} cannot be planned: its place() failed on tensors without values "
        f"({type(error).__name__}: {error}). It can offer place_for_plan (SupportsMemoryPlan of fulmen_protocols)."
    )
