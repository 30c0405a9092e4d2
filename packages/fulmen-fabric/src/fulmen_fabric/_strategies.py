"""``strategy=``, the cluster it runs in, and the launcher that starts its processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fulmen_fabric._devices import is_interactive
from fulmen_fabric.abilities import supports
from fulmen_fabric.rank_zero import PossibleUserWarning, rank_zero_warn
from fulmen_protocols import (
    CLUSTER_ENVIRONMENTS,
    LAUNCHERS,
    STRATEGIES,
    BringsParts,
    BrokenPlugin,
    MissingPackage,
    NotConforming,
    SupportsCollectives,
    SupportsLaunch,
    SupportsStateKindChoice,
    SupportsStrategyChoice,
    SupportsWorldCheck,
    available,
    load,
    load_factory,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fulmen_fabric._notes import Notes
    from fulmen_protocols import Accelerator, ClusterEnvironment, Launcher, Strategy

__all__ = [
    "check_strategy",
    "choose_state_kind",
    "environment_of_strategy",
    "find_environment",
    "find_launcher",
    "find_strategy",
]

_DETECTION_ORDER = ("torchrun", "slurm", "lsf", "mpi")


def find_environment(given: ClusterEnvironment | None, notes: Notes) -> ClusterEnvironment | None:
    """The user's environment, or the first installed one that recognises this process.

    torchrun is asked first, because it also runs inside the jobs of schedulers; then SLURM, LSF, MPI and those of
    others; the local one takes what is left.
    """
    if given is not None:
        return given
    names = sorted(available(CLUSTER_ENVIRONMENTS), key=_detection_order)
    for name in names:
        if name == "local":
            return notes.load(CLUSTER_ENVIRONMENTS, name)
        try:
            factory = load_factory(CLUSTER_ENVIRONMENTS, name)
            detect = getattr(factory, "detect", None)
            detected = bool(detect()) if callable(detect) else load(CLUSTER_ENVIRONMENTS, name).detect()
        except MissingPackage:
            continue
        except (BrokenPlugin, NotConforming) as error:
            rank_zero_warn(f"{error} It is not considered.")
            continue
        if detected:
            return notes.load(CLUSTER_ENVIRONMENTS, name)
    return notes.load(CLUSTER_ENVIRONMENTS, "local")


def _detection_order(name: str) -> tuple[int, str]:
    if name == "local":
        return len(_DETECTION_ORDER) + 1, name
    return (_DETECTION_ORDER.index(name) if name in _DETECTION_ORDER else len(_DETECTION_ORDER)), name


def environment_of_strategy(
    given: ClusterEnvironment | None, found: ClusterEnvironment | None, strategy: Strategy
) -> ClusterEnvironment | None:
    """The strategy's own environment where it brings one and the user has given none, else ``found``."""
    own = strategy.own_environment() if given is None and supports(strategy, BringsParts) else None
    return found if own is None else own


def find_strategy(
    asked: object, accelerator: Accelerator | None, world_size: int, num_nodes: int, notes: Notes
) -> tuple[Strategy, str] | None:
    """The strategy and its name."""
    chooses = accelerator if accelerator is not None and supports(accelerator, SupportsStrategyChoice) else None
    if not isinstance(asked, str):
        strategy = notes.take(STRATEGIES, asked)
        if strategy is not None and chooses is not None:
            notes.conflicts.attempt(lambda: chooses.check_strategy(strategy))
        return None if strategy is None else (strategy, type(strategy).__name__)
    # Lightning takes any case; a vendor's name may hold capitals.
    name = asked if asked in available(STRATEGIES) else asked.lower()
    if chooses is not None:
        before, name = name, chooses.choose_strategy(name, world_size)
        if before not in ("auto", name):
            rank_zero_warn(f"strategy={asked!r} on accelerator {_name_of(accelerator)!r} means {name!r}.")
    processes = "one device" if world_size == 1 else f"{world_size} processes"
    if name == "auto":
        name = _auto_strategy(world_size, num_nodes)
    if asked.lower() == "auto":
        notes.chosen.append(f"strategy='auto' chose {name!r} for {processes}.")
    if name == "dp" and _name_of(accelerator) == "cpu":
        name = "ddp"
        rank_zero_warn("strategy='dp' splits batches over GPUs, of which a run on the CPU has none: using 'ddp'.")
    strategy = notes.load(STRATEGIES, name)
    if strategy is not None and chooses is not None:
        notes.conflicts.attempt(lambda: chooses.check_strategy(strategy))
    return None if strategy is None else (strategy, name)


def _name_of(accelerator: Accelerator | None) -> str:
    return "" if accelerator is None else accelerator.name()


def _auto_strategy(world_size: int, num_nodes: int) -> str:
    installed = available(STRATEGIES)
    if world_size == 1:
        return "single_device"
    return "ddp_fork" if num_nodes == 1 and is_interactive() and "ddp_fork" in installed else "ddp"


def check_strategy(
    strategy: Strategy,
    name: str,
    devices: Sequence[torch.device],
    num_nodes: int,
    environment: ClusterEnvironment | None,
    notes: Notes,
) -> None:
    """Note every way in which the strategy cannot run on these devices in this environment."""
    count, world_size = len(devices), len(devices) * num_nodes
    parallel = supports(strategy, SupportsLaunch) and supports(strategy, SupportsCollectives)
    if world_size > 1 and not parallel:
        where = f"{count} devices" if num_nodes == 1 else f"{count} device(s) on {num_nodes} nodes"
        notes.conflicts.add(
            f"strategy {name!r} runs in one process, but {where} were asked for. "
            "Use devices=1 and num_nodes=1, or a parallel strategy such as 'ddp'."
        )
    if supports(strategy, SupportsWorldCheck):
        notes.conflicts.attempt(lambda: strategy.check_world(devices, num_nodes))
    if devices[0].type == "mps" and supports(strategy, SupportsLaunch):
        notes.conflicts.add(f"strategy {name!r} cannot run on 'mps': torch has no collectives there. Use devices=1.")
    if environment is None:
        return
    started = environment.world_size() if environment.creates_processes_externally else 1
    if not parallel:
        if started > 1 and world_size == 1:
            rank_zero_warn(
                f"{type(environment).__name__} has started {started} processes, but strategy {name!r} with devices=1 "
                "makes each of them a run of its own.",
                PossibleUserWarning,
            )
        return
    before = len(notes.conflicts)
    notes.conflicts.attempt(lambda: environment.validate_settings(count, num_nodes))
    if before == len(notes.conflicts) and environment.creates_processes_externally and started != world_size:
        notes.conflicts.add(
            f"devices={count} on num_nodes={num_nodes} means {world_size} processes, but {type(environment).__name__} "
            f"says that {started} were started. Make the two equal."
        )


def find_launcher(
    strategy: Strategy, name: str, environment: ClusterEnvironment | None, world_size: int, notes: Notes
) -> Launcher | None:
    """The launcher that the strategy names, unless a cluster starts the processes.

    In a process that our launcher has started the environment says that all processes exist; the launcher is found all
    the same: it is its ``launch`` that ties such a process to the one that started it.
    """
    if world_size == 1 or environment is None:
        return None
    if environment.creates_processes_externally and not _is_local(environment):
        return None
    if not supports(strategy, SupportsLaunch):
        return None  # already a conflict
    launcher_name = strategy.launcher
    launcher = notes.load(LAUNCHERS, launcher_name)
    if launcher is not None and is_interactive() and not launcher.is_interactive_compatible:
        other = " or strategy='ddp_notebook'" if "ddp_notebook" in available(STRATEGIES) else ""
        notes.conflicts.add(
            f"strategy {name!r} starts {world_size} processes with launcher {launcher_name!r}, which cannot work in an "
            f"interactive session. Run a script, or use devices=1{other}."
        )
    return launcher


def _is_local(environment: ClusterEnvironment) -> bool:
    """Whether it is the environment of a program that no cluster has started."""
    if "local" not in available(CLUSTER_ENVIRONMENTS):
        return False
    factory = load_factory(CLUSTER_ENVIRONMENTS, "local")
    return isinstance(factory, type) and isinstance(environment, factory)


def choose_state_kind(strategy: Strategy, kind: Literal["full", "sharded"]) -> None:
    """Tell a strategy that saves either what this run prefers."""
    if supports(strategy, SupportsStateKindChoice):
        strategy.default_state_kind(kind)
