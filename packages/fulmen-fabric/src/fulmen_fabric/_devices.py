"""``accelerator=`` and ``devices=``: which kind of device, and which of them on this node."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from fulmen_fabric._notes import shown, source_of
from fulmen_fabric.rank_zero import PossibleUserWarning, rank_zero_warn
from fulmen_protocols import (
    ACCELERATORS,
    BackendUnavailable,
    BrokenPlugin,
    MissingPackage,
    NotConforming,
    available,
    load,
)

if TYPE_CHECKING:
    import torch

    from fulmen_fabric._notes import Notes
    from fulmen_protocols import Accelerator, ClusterEnvironment, Seam, StrategyParts

__all__ = ["devices_of_strategy", "find_accelerator", "find_devices", "is_interactive"]

T = TypeVar("T")

_AUTO_ORDER = ("tpu", "mps", "cuda", "cpu")
_GPU_ORDER = ("mps", "cuda")


def find_accelerator(asked: object, notes: Notes) -> Accelerator | None:
    """The accelerator for ``accelerator=``: a name, ``"auto"``, ``"gpu"`` or an instance."""
    if not isinstance(asked, str):
        if asked is None:
            notes.conflicts.add("accelerator=None says nothing. Leave it out or pass 'auto', a name or an Accelerator.")
            return None
        accelerator = notes.take(ACCELERATORS, asked)
    elif asked in {"auto", "gpu"}:
        return _first_available(asked, notes)
    else:
        accelerator = notes.load(ACCELERATORS, asked)
    if accelerator is not None and accelerator.name() == "cpu":
        _warn_of_idle_gpu()
    if accelerator is not None and not accelerator.is_available():
        usable = ", ".join(_usable_accelerators()) or "none"
        notes.conflicts.add(
            f"accelerator={shown(asked)} was asked for, but this machine has no device of that kind that can be used. "
            f"Usable here: {usable}."
        )
        notes.sources.pop(ACCELERATORS.noun, None)
        return None
    return accelerator


def _first_available(asked: str, notes: Notes) -> Accelerator | None:
    order = _AUTO_ORDER if asked == "auto" else _GPU_ORDER
    absent: list[str] = []
    for name in order:
        accelerator = _quietly_load(ACCELERATORS, name)
        if accelerator is None or not accelerator.is_available():
            absent.append(name)
            continue
        notes.sources[ACCELERATORS.noun] = source_of(ACCELERATORS, name)
        others = f" (not usable here: {', '.join(absent)})" if absent else ""
        notes.chosen.append(f"accelerator={asked!r} chose {name!r}{others}.")
        return accelerator
    usable = ", ".join(_usable_accelerators()) or "none"
    get = "" if available(ACCELERATORS) else f" Ours come with: pip install {ACCELERATORS.home}"
    notes.conflicts.add(
        f"accelerator={asked!r} was asked for, but none of {', '.join(order)} can be used. Usable here: {usable}.{get}"
    )
    return None


def _quietly_load(seam: Seam[T], name: str) -> T | None:
    """For a backend that nobody named: a broken one is reported and passed over."""
    if name not in available(seam):
        return None
    try:
        return load(seam, name)
    except MissingPackage:
        return None
    except (BackendUnavailable, BrokenPlugin, NotConforming) as error:
        rank_zero_warn(f"{error} It is not considered.")
        return None


def _usable_accelerators() -> list[str]:
    found = ((name, _quietly_load(ACCELERATORS, name)) for name in available(ACCELERATORS))
    return [name for name, accelerator in found if accelerator is not None and accelerator.is_available()]


def _warn_of_idle_gpu() -> None:
    idle = [name for name in _usable_accelerators() if name in _GPU_ORDER]
    if idle:
        rank_zero_warn(
            f"accelerator='cpu' was asked for while {idle[0]!r} can be used here. To train on it, pass its name.",
            PossibleUserWarning,
        )


def find_devices(
    asked: object,
    accelerator: Accelerator,
    accelerator_name: str,
    environment: ClusterEnvironment | None,
    num_nodes: int,
    notes: Notes,
) -> tuple[list[int], list[torch.device]] | None:
    """Device ids and ``torch.device``s of this node, one per local rank."""
    if asked == "auto" and isinstance(asked, str):
        asked = _auto_count(accelerator, accelerator_name, environment, num_nodes, notes)
    elif not isinstance(asked, (int, str, Sequence)) or isinstance(asked, (bool, bytes)):
        kind = type(asked).__name__  # pyright: ignore[reportUnknownArgumentType] -- only its name is shown
        notes.conflicts.add(
            f"devices={asked!r} is a {kind}. Pass 'auto', a count, a list of ids or a string such as '0,1'.",
            TypeError(kind),
        )
        return None
    wanted = cast("int | str | Sequence[int]", asked)  # the elements are for the accelerator to judge
    ids = notes.conflicts.attempt(lambda: accelerator.parse_devices(wanted), f"devices={asked!r}")
    if ids is None:
        return None
    if not ids:
        notes.conflicts.add(f"devices={asked!r} names no device. Pass at least one, or 'auto'.")
        return None
    devices = notes.conflicts.attempt(lambda: accelerator.get_parallel_devices(ids), f"devices={asked!r}")
    if devices is not None and len(devices) != len(ids):
        notes.conflicts.add(f"accelerator {accelerator_name!r} gave {len(devices)} devices for {len(ids)} ids {ids}.")
        return None
    return None if devices is None else (ids, devices)


def devices_of_strategy(
    strategy: object, parts: StrategyParts, accelerator: Accelerator, asked: object, notes: Notes
) -> tuple[list[int], list[torch.device]] | None:
    """The devices that the user has given to the strategy, compared with the accelerator and ``devices=``."""
    devices = list(parts.parallel_devices or ())
    kind = type(strategy).__name__
    name = accelerator.name()
    if not devices:
        notes.conflicts.add(f"{kind}(parallel_devices=[]) names no device. Give at least one, or leave it out.")
        return None
    expected = notes.conflicts.attempt(lambda: accelerator.get_parallel_devices([0])) or devices[:1]
    strange = [str(device) for device in devices if device.type != expected[0].type]
    if strange:
        notes.conflicts.add(
            f"{kind}(parallel_devices=...) has {', '.join(strange)}, and accelerator {name!r} drives "
            f"{expected[0].type!r}. Pass accelerator={devices[0].type!r}, or devices of the other kind."
        )
        return None
    if asked != "auto" and not (isinstance(asked, (int, str)) and str(asked) == str(len(devices))):
        notes.conflicts.add(
            f"{kind}(parallel_devices=...) has {len(devices)} devices, and devices={asked!r} was given too. "
            "Give one of the two."
        )
        return None
    return [device.index or 0 for device in devices], devices


def _auto_count(
    accelerator: Accelerator,
    name: str,
    environment: ClusterEnvironment | None,
    num_nodes: int,
    notes: Notes,
) -> int:
    started = environment.world_size() if environment is not None and environment.creates_processes_externally else 0
    if environment is not None and started > 1 and started % num_nodes == 0:
        count = started // num_nodes
        kind = type(environment).__name__
        notes.chosen.append(
            f"devices='auto' chose {count}: {kind} has started {started} processes on {num_nodes} node(s)."
        )
        return count
    count = accelerator.auto_device_count()
    if count > 1 and is_interactive():
        notes.chosen.append(
            f"devices='auto' chose 1 of {count}, because this session is interactive; pass devices={count}."
        )
        return 1
    notes.chosen.append(f"devices='auto' chose {count} for accelerator {name!r}.")
    return count


def is_interactive() -> bool:
    """Whether Python runs a prompt: a launcher that re-executes the script has none to re-execute."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
