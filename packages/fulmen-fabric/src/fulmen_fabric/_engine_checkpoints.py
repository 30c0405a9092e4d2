"""What ``Fabric.save`` and ``Fabric.load`` do where the strategy's engine writes module and optimizer itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from fulmen_fabric._state import load_into, to_saved
from fulmen_fabric.wrappers import FabricModule
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fulmen_protocols import OwnsCheckpoints

__all__ = ["load", "save"]


def save(
    owner: OwnsCheckpoints,
    path: str,
    state: Mapping[str, object],
    filters: Mapping[str, Callable[[str, Any], bool]] | None,
) -> None:
    """Write the folder ``path`` with the one module of ``state``, its optimizer and everything else.

    Raises:
        MisconfigurationException: several modules, or a filter for what the engine writes.
    """
    module = _module_of(state, f"save({path!r})")
    rest = {name: value for name, value in state.items() if not isinstance(value, (FabricModule, Optimizer))}
    wrong = sorted(set(filters or {}) - rest.keys())
    if wrong:
        raise MisconfigurationException(
            f"save got filters for {', '.join(map(repr, wrong))}, which the strategy's engine writes as a whole. Leave "
            "them out, or filter other entries."
        )
    owner.save_checkpoint(module.placed, to_saved(rest, filters or {}), path)


def load(
    owner: OwnsCheckpoints, path: str, state: dict[str, Any] | None, strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    """Load the one module of ``state``, its optimizer if that is there too, and everything else; return the rest.

    Raises:
        MisconfigurationException: no module, or several.
        KeyError: strict, and a name of ``state`` is not in the checkpoint; nothing has been changed then.
    """
    given = state or {}
    module = _module_of(given, f"load({path!r})")
    saved = owner.read_rest(path, weights_only)
    others = {name: value for name, value in given.items() if not isinstance(value, (FabricModule, Optimizer))}
    rest = load_into(others, saved, strict, path)
    given.update(others)
    with_optimizer = any(isinstance(value, Optimizer) for value in given.values())
    owner.load_checkpoint(module.placed, path, optimizers=with_optimizer, strict=strict, weights_only=weights_only)
    return rest


def _module_of(state: Mapping[str, object], call: str) -> FabricModule:
    modules = {id(value): value for value in state.values() if isinstance(value, FabricModule)}
    if len(modules) != 1:
        raise MisconfigurationException(
            f"{call} got a state with {len(modules)} modules that were set up, and the strategy's engine handles one "
            "module in a checkpoint. Give exactly one, each module to a path of its own."
        )
    return next(iter(modules.values()))
