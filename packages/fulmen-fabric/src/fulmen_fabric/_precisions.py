"""``precision=``: its canonical name, and the strategy that may have to apply it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from fulmen_fabric._notes import shown
from fulmen_fabric.abilities import supports
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import (
    PRECISIONS,
    BringsParts,
    SupportsDeviceCheck,
    SupportsPrecisionCheck,
    SupportsPrecisionPlan,
    available,
    load_factory,
)

if TYPE_CHECKING:
    from fulmen_fabric._notes import Notes
    from fulmen_protocols import Precision, Strategy

__all__ = ["find_precision", "hand_over_precision"]

_PRECISION_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
_AMBIGUOUS_ALIASES = ("16", "bf16")
_ELSEWHERE = {
    ("fp16", "float16", "half", "16-amp", "amp"): "16-mixed' or '16-true",
    ("bfloat16", "bf16-amp"): "bf16-mixed' or 'bf16-true",
    ("fp32", "float32", "float", "full", "no"): "32-true",
    ("fp64", "float64", "double"): "64-true",
}
"""What torch and other frameworks call them: too far from ours in spelling, or nearest to another one."""


def find_precision(
    asked: object, given: Precision | None, strategy: Strategy | None, device_type: str | None, notes: Notes
) -> tuple[Precision, str] | None:
    """The precision and its canonical name. ``device_type`` is None where the devices are in conflict already."""
    if given is not None:
        if asked is not None:
            notes.conflicts.add(
                f"precision={shown(asked)} and the plugin {type(given).__name__} both set the precision. "
                "Give one of the two."
            )
        if device_type is not None and supports(given, SupportsDeviceCheck):
            notes.conflicts.attempt(lambda: given.check_device(device_type))
        own_name = getattr(given, "precision", None)
        return given, own_name if isinstance(own_name, str) else type(given).__name__
    name = _canonical_precision(asked, notes)
    if name is None:
        return None
    if strategy is not None and supports(strategy, BringsParts):
        before = len(notes.conflicts)
        own = notes.conflicts.attempt(lambda: strategy.own_precision(name))
        if own is not None:
            notes.sources[PRECISIONS.noun] = f"{name} of {type(strategy).__name__}"
            return own, name
        if len(notes.conflicts) > before:
            return None
    factory = notes.conflicts.attempt(lambda: load_factory(PRECISIONS, name))
    if factory is None or device_type is None:
        return None
    options: dict[str, object] = {"device": device_type} if _takes_device(factory) else {}
    precision = notes.load(PRECISIONS, name, **options)
    return None if precision is None else (precision, name)


def _canonical_precision(asked: object, notes: Notes) -> str | None:
    """``"16-mixed"`` for 16, and so on; None after noting that ``asked`` has the wrong type."""
    if asked is None:
        return "32-true"
    if isinstance(asked, bool) or not isinstance(asked, (str, int)):
        notes.conflicts.add(
            f"precision={shown(asked)} is neither a name nor one of 16, 32, 64. A Precision object goes to plugins=.",
            TypeError(type(asked).__name__),
        )
        return None
    name = str(asked)
    for spellings, ours in _ELSEWHERE.items():
        if name.lower() in spellings and name not in available(PRECISIONS):
            notes.conflicts.add(f"no precision is named {name!r}. Write '{ours}'.")
            return None
    canonical = _PRECISION_ALIASES.get(name, name)
    if name in _AMBIGUOUS_ALIASES:
        true = canonical.replace("mixed", "true")
        rank_zero_warn(
            f"precision={asked!r} is read as {canonical!r}. Write {canonical!r}, or {true!r} if you meant that."
        )
    return canonical


def _takes_device(factory: object) -> bool:
    if not callable(factory):
        return False
    try:
        parameter = inspect.signature(factory).parameters.get("device")
    except ValueError:  # a class made in C tells no signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def hand_over_precision(strategy: Strategy, name: str, precision: Precision, notes: Notes) -> None:
    """Give the plan to a strategy that applies it itself, or wants to see it."""
    if supports(strategy, SupportsPrecisionCheck):
        notes.conflicts.attempt(lambda: strategy.check_precision(precision.plan()))
    if supports(strategy, SupportsPrecisionPlan):
        notes.conflicts.attempt(lambda: strategy.apply_precision_plan(precision.plan()), f"strategy {name!r}")
