"""What the user hands over as objects: ``plugins=``, and the parts that a strategy was made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from fulmen_fabric._notes import shown
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    CHECKPOINT_IOS,
    CLUSTER_ENVIRONMENTS,
    PRECISIONS,
    BringsParts,
    CarriesParts,
    LayerSync,
    StrategyParts,
    SupportsShardedSave,
    SupportsShardedState,
    WrapsCheckpointIO,
    missing_members,
)

if TYPE_CHECKING:
    from fulmen_fabric._notes import Notes
    from fulmen_protocols import CheckpointIO, ClusterEnvironment, Precision, Seam, Strategy

__all__ = ["Plugins", "find_checkpoint_io", "parts_of_strategy", "sort_plugins"]

T = TypeVar("T")

_LAYER_SYNC = "layer sync"
_PLUGIN_SEAMS: tuple[Seam[object], ...] = (PRECISIONS, CHECKPOINT_IOS, CLUSTER_ENVIRONMENTS)


@dataclass(slots=True)
class Plugins:
    """``plugins=``, sorted by what each one is."""

    precision: Precision | None = None
    checkpoint_io: CheckpointIO | None = None
    environment: ClusterEnvironment | None = None
    layer_sync: LayerSync | None = None


def sort_plugins(plugins: object, notes: Notes, *, takes_layer_sync: bool) -> Plugins:
    """Recognise each plugin by the members it has; at most one of a kind."""
    if plugins is None:
        given: list[object] = []
    elif isinstance(plugins, Sequence) and not isinstance(plugins, str):
        given = list(plugins)  # pyright: ignore[reportUnknownArgumentType] -- elements are checked one by one below
    else:
        given = [plugins]
    by_seam: dict[str, list[object]] = {seam.noun: [] for seam in _PLUGIN_SEAMS}
    by_seam[_LAYER_SYNC] = []
    for plugin in given:
        if isinstance(plugin, type):
            notes.conflicts.add(
                f"plugins: got the class {plugin.__name__}, not an instance. Write {plugin.__name__}(...)."
            )
            continue
        kinds = [seam.noun for seam in _PLUGIN_SEAMS if not missing_members(seam.protocol, plugin)]
        if not missing_members(LayerSync, plugin):
            kinds.append(_LAYER_SYNC)
            if not takes_layer_sync:
                notes.conflicts.add(
                    f"plugins: {type(plugin).__name__} is a {_LAYER_SYNC}, which a Trainer applies. With a Fabric call "
                    "its apply(model) before setup()."
                )
        if not kinds:
            notes.conflicts.add(*_unknown_plugin(plugin))
        for noun in kinds:
            by_seam[noun].append(plugin)
    for noun, found in by_seam.items():
        if len(found) > 1:
            names = ", ".join(type(one).__name__ for one in found)
            notes.conflicts.add(f"plugins: {len(found)} of them are a {noun} ({names}). Give at most one.")
    return Plugins(
        _one(PRECISIONS, by_seam, notes),
        _one(CHECKPOINT_IOS, by_seam, notes),
        _one(CLUSTER_ENVIRONMENTS, by_seam, notes),
        cast("LayerSync | None", next(iter(by_seam[_LAYER_SYNC]), None)),
    )


def _one(seam: Seam[T], by_seam: dict[str, list[object]], notes: Notes) -> T | None:
    found = by_seam[seam.noun]
    return notes.take(seam, found[0]) if found else None


def _unknown_plugin(plugin: object) -> tuple[str, TypeError]:
    wrong = TypeError(type(plugin).__name__)
    if isinstance(plugin, str):
        why = "A name of a precision goes to precision=, of a strategy to strategy=."
        return f"plugins: {plugin!r} is a string. {why}", wrong
    nearest = min(_PLUGIN_SEAMS, key=lambda seam: len(missing_members(seam.protocol, plugin)))
    lacks = ", ".join(missing_members(nearest.protocol, plugin))
    kinds = ", ".join([*(seam.protocol.__name__ for seam in _PLUGIN_SEAMS), LayerSync.__name__])
    text = (
        f"plugins: {type(plugin).__name__} is none of {kinds}. "
        f"It comes closest to {nearest.protocol.__name__}, but lacks {lacks}."
    )
    return text, wrong


def parts_of_strategy(
    strategy: object, accelerator: object, given: Plugins, precision: object, notes: Notes
) -> StrategyParts:
    """What the user has given to the strategy; what was given elsewhere too is a conflict."""
    if isinstance(strategy, str) or not supports(strategy, CarriesParts):
        return StrategyParts()
    parts = strategy.parts
    kind = type(strategy).__name__

    def twice(argument: str, part: object, flag: str, value: object) -> None:
        notes.conflicts.add(
            f"{kind}({argument}={type(part).__name__}(...)) and {flag}={shown(value)} both say it. Give one of the two."
        )

    if parts.accelerator is not None and accelerator != "auto":
        twice("accelerator", parts.accelerator, "accelerator", accelerator)
    if parts.precision is not None and (precision is not None or given.precision is not None):
        flag, value = ("precision", precision) if precision is not None else ("plugins", given.precision)
        twice("precision_plugin", parts.precision, flag, value)
    if parts.checkpoint_io is not None and given.checkpoint_io is not None:
        twice("checkpoint_io", parts.checkpoint_io, "plugins", given.checkpoint_io)
    if parts.cluster_environment is not None and given.environment is not None:
        twice("cluster_environment", parts.cluster_environment, "plugins", given.environment)
    return parts


def find_checkpoint_io(given: CheckpointIO | None, strategy: Strategy | None, notes: Notes) -> CheckpointIO | None:
    """The user's checkpoint IO, or the one for what the strategy saves: ``"sharded"`` for folders, else ``"torch"``.

    The latter also goes into a wrapper that has none; ``"sharded"`` only into one that lets every rank write.
    """
    if given is not None and not (supports(given, WrapsCheckpointIO) and given.checkpoint_io is None):
        return given
    own = strategy.own_checkpoint_io() if strategy is not None and supports(strategy, BringsParts) else None
    shards = strategy is not None and supports(strategy, SupportsShardedState) and strategy.state_kind == "sharded"
    if given is None:
        if own is not None:
            notes.sources[CHECKPOINT_IOS.noun] = f"{type(own).__name__} of {type(strategy).__name__}"
            return own
        return notes.load(CHECKPOINT_IOS, "sharded" if shards else "torch")
    assert supports(given, WrapsCheckpointIO)
    given.checkpoint_io = notes.load(CHECKPOINT_IOS, "sharded" if shards else "torch") if own is None else own
    if own is None and shards and not supports(given, SupportsShardedSave):
        given.checkpoint_io = notes.load(CHECKPOINT_IOS, "torch")
    return given
