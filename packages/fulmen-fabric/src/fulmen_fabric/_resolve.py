"""One function per argument of ``assemble``: what was asked for becomes a part, or a conflict is noted."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from fulmen_fabric._conflicts import Conflicts
from fulmen_fabric.abilities import supports
from fulmen_fabric.rank_zero import PossibleUserWarning, rank_zero_warn
from fulmen_protocols import (
    ACCELERATORS,
    CHECKPOINT_IOS,
    CLUSTER_ENVIRONMENTS,
    LAUNCHERS,
    PRECISIONS,
    STRATEGIES,
    BackendUnavailable,
    BringsParts,
    BrokenPlugin,
    CarriesParts,
    LayerSync,
    MissingPackage,
    NotConforming,
    StrategyParts,
    SupportsCollectives,
    SupportsLaunch,
    SupportsPrecisionCheck,
    SupportsPrecisionPlan,
    SupportsShardedState,
    SupportsStateKindChoice,
    SupportsStrategyChoice,
    SupportsWorldCheck,
    WrapsCheckpointIO,
    available,
    check,
    load,
    load_factory,
    missing_members,
)
from fulmen_protocols.discovery import entry_points

if TYPE_CHECKING:
    import torch

    from fulmen_protocols import Accelerator, CheckpointIO, ClusterEnvironment, Launcher, Precision, Seam, Strategy

__all__ = [
    "Notes",
    "Plugins",
    "check_strategy",
    "choose_state_kind",
    "devices_of_strategy",
    "environment_of_strategy",
    "find_accelerator",
    "find_checkpoint_io",
    "find_devices",
    "find_environment",
    "find_launcher",
    "find_precision",
    "find_strategy",
    "hand_over_precision",
    "is_interactive",
    "parts_of_strategy",
    "sort_plugins",
]

T = TypeVar("T")

_AUTO_ORDER = ("tpu", "mps", "cuda", "cpu")
_GPU_ORDER = ("mps", "cuda")
_DETECTION_ORDER = ("torchrun", "slurm", "lsf", "mpi")
_PRECISION_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
_AMBIGUOUS_ALIASES = ("16", "bf16")
_LAYER_SYNC = "layer sync"
_PLUGIN_SEAMS: tuple[Seam[object], ...] = (PRECISIONS, CHECKPOINT_IOS, CLUSTER_ENVIRONMENTS)


@dataclass(slots=True)
class Notes:
    """What assembling has found out so far."""

    conflicts: Conflicts = field(default_factory=Conflicts)
    chosen: list[str] = field(default_factory=list[str])
    sources: dict[str, str] = field(default_factory=dict[str, str])

    def load(self, seam: Seam[T], name: str, **options: object) -> T | None:
        """The backend of that name, or None after noting why there is none."""
        backend = self.conflicts.attempt(lambda: load(seam, name, **options))
        if backend is not None:
            self.sources[seam.noun] = _source(seam, name)
        return backend

    def take(self, seam: Seam[T], backend: object) -> T | None:
        """The user's own object, or None after noting what it lacks."""
        if isinstance(backend, type):
            self.conflicts.add(
                f"{seam.noun}: got the class {backend.__name__}, not an instance. Write {backend.__name__}(...)."
            )
            return None
        checked = self.conflicts.attempt(lambda: check(seam, backend))
        if checked is not None:
            self.sources[seam.noun] = f"an instance of {type(backend).__name__}"
        return checked


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
            f"{kind}({argument}={type(part).__name__}(...)) and {flag}={_shown(value)} both say it. "
            "Give one of the two."
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
            f"accelerator={_shown(asked)} was asked for, but this machine has no device of that kind that can be used. "
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
        notes.sources[ACCELERATORS.noun] = _source(ACCELERATORS, name)
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


def _canonical_precision(asked: object, notes: Notes) -> str | None:
    """``"16-mixed"`` for 16, and so on; None after noting that ``asked`` has the wrong type."""
    if asked is None:
        return "32-true"
    if isinstance(asked, bool) or not isinstance(asked, (str, int)):
        notes.conflicts.add(
            f"precision={_shown(asked)} is neither a name nor one of 16, 32, 64. A Precision object goes to plugins=.",
            TypeError(type(asked).__name__),
        )
        return None
    name = str(asked)
    canonical = _PRECISION_ALIASES.get(name, name)
    if name in _AMBIGUOUS_ALIASES:
        true = canonical.replace("mixed", "true")
        rank_zero_warn(
            f"precision={asked!r} is read as {canonical!r}. Write {canonical!r}, or {true!r} if you meant that."
        )
    return canonical


def find_precision(
    asked: object, given: Precision | None, strategy: Strategy | None, device_type: str | None, notes: Notes
) -> tuple[Precision, str] | None:
    """The precision and its canonical name. ``device_type`` is None where the devices are in conflict already."""
    if given is not None:
        if asked is not None:
            notes.conflicts.add(
                f"precision={_shown(asked)} and the plugin {type(given).__name__} both set the precision. "
                "Give one of the two."
            )
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


def choose_state_kind(strategy: Strategy, kind: Literal["full", "sharded"]) -> None:
    """Tell a strategy that saves either what this run prefers."""
    if supports(strategy, SupportsStateKindChoice):
        strategy.default_state_kind(kind)


def find_checkpoint_io(given: CheckpointIO | None, strategy: Strategy | None, notes: Notes) -> CheckpointIO | None:
    """The user's checkpoint IO, or the one for what the strategy saves: ``"sharded"`` for folders, else ``"torch"``.

    The latter also goes into a wrapper that has none.
    """
    if given is None:
        own = strategy.own_checkpoint_io() if strategy is not None and supports(strategy, BringsParts) else None
        if own is not None:
            notes.sources[CHECKPOINT_IOS.noun] = f"{type(own).__name__} of {type(strategy).__name__}"
            return own
        shards = strategy is not None and supports(strategy, SupportsShardedState) and strategy.state_kind == "sharded"
        return notes.load(CHECKPOINT_IOS, "sharded" if shards else "torch")
    if supports(given, WrapsCheckpointIO) and given.checkpoint_io is None:
        own = strategy.own_checkpoint_io() if strategy is not None and supports(strategy, BringsParts) else None
        given.checkpoint_io = notes.load(CHECKPOINT_IOS, "torch") if own is None else own
    return given


def _shown(asked: object) -> str:
    return repr(asked) if isinstance(asked, (str, int, float)) else type(asked).__name__


def _source(seam: Seam[T], name: str) -> str:
    point = entry_points(seam.group)[name]
    return f"{name} from {point.dist.name} {point.dist.version}" if point.dist is not None else name
