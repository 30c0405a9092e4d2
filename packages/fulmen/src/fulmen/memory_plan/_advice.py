"""What to change where a plan does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.memory_plan.report import in_units

if TYPE_CHECKING:
    from fulmen.memory_plan.report import MemoryPlan

__all__ = ["verdict"]


def verdict(plan: MemoryPlan, memory: int) -> list[str]:
    """Lines that say whether ``plan`` fits into ``memory`` bytes a rank, and what to change if not.

    Each saving is an estimate of its own; they do not add up exactly.
    """
    over = plan.excess(memory)
    if over <= 0:
        share = 100 * plan.peak / memory
        line = f"fits: the peak of {in_units(plan.peak)} is {share:.0f} % of {in_units(memory)}"
        tight = " Leave room: the driver's context and fragmentation need about 5 % more." if share > 93 else ""
        return [line + "." + tight]
    lines = [
        f"does NOT fit: the peak of {in_units(plan.peak)} is {in_units(over)} above {in_units(memory)}, "
        f"in the {plan.peak_during}. What would help:"
    ]
    lines += [f"  - {text}{_enough(saved, over)}" for text, saved in _savings(plan) if saved > 0.01 * plan.peak]
    if len(lines) == 1:
        lines.append("  - more devices with model parallelism, or a smaller model")
    return lines


def _enough(saved: int, over: int) -> str:
    return f" (saves about {in_units(saved)}{', enough' if saved >= over else ''})"


def _savings(plan: MemoryPlan) -> list[tuple[str, int]]:
    """Changes and the bytes that each saves on one rank, the largest first."""
    states = plan.parameters + plan.gradients + plan.optimizer
    activations, temporaries = plan.at_peak.get("activations", 0), plan.at_peak.get("temporaries", 0)
    is_whole = all(group.placement == "whole" for group in plan.groups)
    found: list[tuple[str, int]] = []
    if plan.world_size > 1 and is_whole:
        saved = states * (plan.world_size - 1) // plan.world_size + plan.at_peak.get("communication", 0)
        found.append((f"strategy='fsdp' instead of {plan.strategy!r}, over the same {plan.world_size} ranks", saved))
    elif plan.world_size > 1:
        gathered = plan.at_peak.get("communication", 0)
        if gathered > 0.3 * plan.peak:
            found.append(("smaller units: auto_wrap_policy={Block} of the strategy (--wrap Block)", gathered * 3 // 4))
        found.append(("twice as many devices to shard over", states // 2))
    else:
        found.append(("strategy='fsdp' on 8 devices", states * 7 // 8))
    if plan.peak_during == "optimizer step":
        found.append(("an optimizer with fused=True, which needs no copies while it steps", temporaries))
    else:
        found.append(("half the batch, with accumulate_grad_batches twice as large", (activations + temporaries) // 2))
        found.append(("activation checkpointing of each block", activations * 3 // 4))
    if all(group.dtype == "float32" for group in plan.groups):
        found.append(("precision='bf16-true'", states // 2))
    found.append(("an optimizer with less state, such as 8-bit AdamW", plan.optimizer * 3 // 4))
    return sorted(found, key=lambda each: -each[1])
