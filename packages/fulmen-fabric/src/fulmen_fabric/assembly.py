"""From names and objects to the parts of a run: the only function that knows every seam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from fulmen_fabric._devices import devices_of_strategy, find_accelerator, find_devices
from fulmen_fabric._notes import Notes
from fulmen_fabric._plugins import find_checkpoint_io, parts_of_strategy, sort_plugins
from fulmen_fabric._precisions import find_precision, hand_over_precision
from fulmen_fabric._strategies import (
    check_strategy,
    choose_state_kind,
    environment_of_strategy,
    find_environment,
    find_launcher,
    find_strategy,
)
from fulmen_fabric.abilities import supports
from fulmen_fabric.registry import ACCELERATOR_REGISTRY, STRATEGY_REGISTRY
from fulmen_protocols import SupportsDevices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from fulmen_protocols import Accelerator, CheckpointIO, ClusterEnvironment, Launcher, LayerSync, Precision, Strategy

__all__ = ["Assembly", "assemble"]


@dataclass(frozen=True, slots=True)
class Assembly:
    """The backends of one run, checked against each other. Nothing has been started yet."""

    accelerator: Accelerator
    accelerator_name: str
    devices: tuple[torch.device, ...]
    """This node's, one per local rank."""
    device_ids: tuple[int, ...]
    num_nodes: int
    strategy: Strategy
    strategy_name: str
    precision: Precision
    precision_name: str
    """Canonical, for example ``"bf16-mixed"``."""
    environment: ClusterEnvironment
    launcher: Launcher | None
    """None for a single process, or where a cluster starts the processes."""
    checkpoint_io: CheckpointIO
    chosen: tuple[str, ...]
    """One line for each ``"auto"``: what it chose and why."""
    sources: Mapping[str, str]
    """Noun of each seam, and where its part comes from: ``"ddp from fulmen-strategies 0.1.0"``."""
    layer_sync: LayerSync | None = None
    """Of a Trainer, which applies it around a fit."""

    @property
    def world_size(self) -> int:
        """Number of processes of the run, one per device."""
        return len(self.devices) * self.num_nodes


def assemble(
    *,
    accelerator: str | Accelerator = "auto",
    strategy: str | Strategy = "auto",
    devices: list[int] | str | int = "auto",
    num_nodes: int = 1,
    precision: str | int | None = None,
    plugins: object | Sequence[object] | None = None,
    state_kind: Literal["full", "sharded"] = "full",
    takes_layer_sync: bool = False,
) -> Assembly:
    """Find every part by name or take the object given, and check them against each other and the environment.

    Starts no process and writes nothing.

    Args:
        accelerator: a name, an instance, ``"gpu"`` (mps or cuda) or ``"auto"`` (tpu, mps, cuda, cpu: the first usable).
        strategy: a name, an instance, or ``"auto"``: what the accelerator wants, else ``"single_device"`` for one
            process and ``"ddp"`` for several.
        devices: per node: a count, a list of ids, a string that the accelerator reads, or ``"auto"``.
        num_nodes: number of machines, at least 1.
        precision: a name, or an alias such as ``16`` or ``"bf16"``; None means ``"32-true"``.
        plugins: a ``Precision``, a ``CheckpointIO``, a ``ClusterEnvironment``, at most one of each, in any order.
        state_kind: what a checkpoint of a strategy that can save both holds, where the user has not said it.
        takes_layer_sync: whether a ``LayerSync`` may be among them.

    Raises:
        MisconfigurationException: with every conflict found, not only the first.
    """
    accelerator = cast("str | Accelerator", ACCELERATOR_REGISTRY.resolve(accelerator))
    strategy = cast("str | Strategy", STRATEGY_REGISTRY.resolve(strategy))
    notes = Notes()
    given = sort_plugins(plugins, notes, takes_layer_sync=takes_layer_sync)
    parts = parts_of_strategy(strategy, accelerator, given, precision, notes)
    nodes = num_nodes
    if type(num_nodes) is not int or num_nodes < 1:
        notes.conflicts.add(f"num_nodes={num_nodes!r} is not a whole number of at least 1.")
        nodes = 1

    given_environment = given.environment or parts.cluster_environment
    environment = find_environment(given_environment, notes)
    accelerator_part = find_accelerator(parts.accelerator or accelerator, notes)
    accelerator_name = "" if accelerator_part is None else accelerator_part.name()
    if accelerator_part is None:
        found = None
    elif parts.parallel_devices is not None:
        found = devices_of_strategy(strategy, parts, accelerator_part, devices, notes)
    else:
        found = find_devices(devices, accelerator_part, accelerator_name, environment, nodes, notes)
    # With the devices in conflict, the other arguments are still checked as far as they can be.
    device_ids, node_devices = found if found is not None else ([], [])
    world_size = max(1, len(node_devices)) * nodes

    placed = find_strategy(strategy, accelerator_part, world_size, nodes, notes)
    launcher = None
    if placed is not None:
        environment = environment_of_strategy(given_environment, environment, placed[0])
    if placed is not None and node_devices and supports(placed[0], SupportsDevices):
        # One process, to which the others' devices belong as well.
        placed[0].take_devices(node_devices)
        node_devices, device_ids, world_size = node_devices[:1], device_ids[:1], nodes
    if placed is not None and node_devices:
        check_strategy(*placed, node_devices, nodes, environment, notes)
        launcher = find_launcher(*placed, environment, world_size, notes)
    own_precision = given.precision or parts.precision
    device_type = node_devices[0].type if node_devices else None
    named = precision if own_precision is given.precision else None
    numbers = find_precision(named, own_precision, None if placed is None else placed[0], device_type, notes)
    if placed is not None and numbers is not None:
        hand_over_precision(*placed, numbers[0], notes)
    if placed is not None:
        choose_state_kind(placed[0], state_kind)
    chosen_io = given.checkpoint_io or parts.checkpoint_io
    checkpoint_io = find_checkpoint_io(chosen_io, None if placed is None else placed[0], notes)

    notes.conflicts.raise_if_any()
    if placed is None or numbers is None:
        raise AssertionError("a part is missing without a conflict")  # unreachable: each finder notes why
    return Assembly(
        accelerator=cast("Accelerator", accelerator_part),
        accelerator_name=accelerator_name,
        devices=tuple(node_devices),
        device_ids=tuple(device_ids),
        num_nodes=nodes,
        strategy=placed[0],
        strategy_name=placed[1],
        precision=numbers[0],
        precision_name=numbers[1],
        environment=cast("ClusterEnvironment", environment),
        launcher=launcher,
        checkpoint_io=cast("CheckpointIO", checkpoint_io),
        chosen=tuple(notes.chosen),
        sources=dict(notes.sources),
        layer_sync=given.layer_sync,
    )
