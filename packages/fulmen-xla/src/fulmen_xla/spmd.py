"""XLASPMDStrategy: one process drives all devices of this machine, and the compiler spreads the work (FSDPv2)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from fulmen_protocols.errors import MisconfigurationException
from fulmen_protocols.nested import map_instances
from fulmen_xla import _limits, _sharding
from fulmen_xla._arguments import parts_of, wrap_policy
from fulmen_xla._entry import Entry
from fulmen_xla._host import to_host
from fulmen_xla._library import library, require
from fulmen_xla._modes import start_spmd
from fulmen_xla._place import DevicePlace, too_early
from fulmen_xla._placing import created_on_host, quiet_hooks, sync
from fulmen_xla._shards import Outcome
from fulmen_xla.checkpoint_io import XLACheckpointIO

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import nn
    from torch.optim import Optimizer

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.precision import Precision, PrecisionPlan
    from fulmen_protocols.strategy import StrategyParts
    from fulmen_protocols.topology import Topology

__all__ = ["XLASPMDStrategy"]


class XLASPMDStrategy:
    """Fully sharded data parallelism by torch-xla's compiler (``SpmdFullyShardedDataParallel``), in one process.

    The program is written for one device. Parameters, gradients and optimizer state are spread over the devices of the
    mesh's dimension ``"fsdp"``, each batch along its first dimension over all of them; the compiler adds what the
    devices must tell each other. So there is one rank, batches are those of the whole run, and losses are those of one
    device.

    Args:
        accelerator: as the Trainer's argument.
        checkpoint_io: writes checkpoints; None: ``XLACheckpointIO`` for whole ones, the sharded format for folders.
        precision: an ``XLAPrecision``; ``precision_plugin`` is its other name.
        precision_plugin: see there.
        auto_wrap_policy: classes of layers that are gathered one by one, or torch-xla's policy function; None: the
            compiler decides.
        data_parallel_size: how many copies of the sharded model there are; the devices must divide by it.
        state_dict_type: ``"full"`` checkpoints are one file, ``"sharded"`` ones a folder. None: as the run prefers.
        debug: let torch-xla report what it compiles, and why (PT_XLA_DEBUG).

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
        MisconfigurationException: an argument is out of range.
    """

    drives = "xla"
    allows_inference_mode = False  # XLA tensors keep a version counter, which inference tensors have not

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        auto_wrap_policy: Collection[type[nn.Module]] | Callable[..., bool] | None = None,
        data_parallel_size: int = 1,
        state_dict_type: Literal["full", "sharded"] | None = None,
        debug: bool = False,
    ) -> None:
        if type(data_parallel_size) is not int or data_parallel_size < 1:
            raise MisconfigurationException(
                f"XLASPMDStrategy(data_parallel_size={data_parallel_size!r}) is not a whole number of at least 1."
            )
        if state_dict_type not in (None, "full", "sharded"):
            raise MisconfigurationException(
                f"XLASPMDStrategy(state_dict_type={state_dict_type!r}): use 'full' (one file) or 'sharded' (a folder)."
            )
        require("XLASPMDStrategy")
        self._parts = parts_of("XLASPMDStrategy", accelerator, None, checkpoint_io, precision, precision_plugin)
        self._policy = wrap_policy("XLASPMDStrategy", auto_wrap_policy)
        self._copies = data_parallel_size
        self._asked_kind: Literal["full", "sharded"] | None = state_dict_type
        self._default_kind: Literal["full", "sharded"] = "full"
        self._devices: tuple[torch.device, ...] = ()
        self._place = DevicePlace("XLASPMDStrategy", reports=debug)
        self._mesh: Any = None
        self._with_sharded_state: set[int] = set()

    @property
    def parts(self) -> StrategyParts:
        """What the user gave."""
        return self._parts

    def own_environment(self) -> None:
        """Whatever is detected: there is one process."""

    def own_precision(self, name: str) -> Precision:
        """``XLAPrecision`` of that name."""
        return _limits.own_precision("xla_spmd", name)

    def own_checkpoint_io(self) -> CheckpointIO | None:
        """``XLACheckpointIO`` for whole checkpoints; folders are written as any strategy's are."""
        return XLACheckpointIO() if self.state_kind == "full" else None

    def check_precision(self, plan: PrecisionPlan) -> None:
        """Refuse a precision that scales losses, or is none of XLA's."""
        _limits.check_plan("xla_spmd", plan)

    def take_devices(self, devices: Sequence[torch.device]) -> None:
        """Take over all devices of this machine."""
        self._devices = tuple(devices)

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Refuse devices of another kind, several machines, and a mesh that does not come out even."""
        _limits.check_devices("xla_spmd", devices)
        if num_nodes > 1:
            raise MisconfigurationException(
                f"strategy 'xla_spmd' with num_nodes={num_nodes}: its one process drives the devices of one machine. "
                "Use num_nodes=1, or strategy='xla' or 'xla_fsdp' for several."
            )
        count = max(1, len(self._devices))
        if count % self._copies:
            raise MisconfigurationException(
                f"XLASPMDStrategy(data_parallel_size={self._copies}) does not divide the {count} device(s) of this "
                f"run. Use one of {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}."
            )

    @property
    def root_device(self) -> torch.device:
        """The one device that stands for all.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._place.device

    @property
    def mesh(self) -> Any:
        """torch-xla's ``Mesh`` of all devices, with the dimensions ``"data"`` and ``"fsdp"``.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        if self._mesh is None:
            raise too_early("XLASPMDStrategy", "mesh")
        return self._mesh

    def setup_environment(self, topology: Topology) -> None:
        """Put this process into SPMD mode and make the mesh.

        Raises:
            MisconfigurationException: the run has several processes, or fewer devices than the machine.
        """
        if topology.world_size > 1:
            raise MisconfigurationException(
                f"XLASPMDStrategy runs in one process, but the run has {topology.world_size}: use strategy='xla'."
            )
        start_spmd()
        count = int(library("runtime").global_runtime_device_count())
        asked = len(self._devices) or count
        if asked != count:
            raise MisconfigurationException(
                f"strategy 'xla_spmd' drives every device that the runtime has, which are {count}, and "
                f"devices={asked} was asked for. Use devices='auto', or set CPU_NUM_DEVICES or TPU_VISIBLE_CHIPS."
            )
        self._place.take()
        self._mesh = _sharding.make_mesh(count, self._copies)

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Create modules on the host, from where ``place`` spreads them; with ``empty`` without initialising them."""
        return created_on_host(empty=empty)

    def place(self, module: nn.Module) -> nn.Module:
        """Spread ``module``'s parameters over the devices, in place, and wrap it.

        ``module`` keeps computing the same; the wrapper also spreads what its ``forward`` returns.
        """
        self._place.move(module)
        quiet_hooks()
        wrapper: Any = library("experimental.spmd_fully_sharded_data_parallel").SpmdFullyShardedDataParallel
        # Layers of a module that was placed before, for the fit before a test say, are wrapped already.
        is_wrapped = any(isinstance(one, wrapper) for one in module.modules())
        return cast(
            "nn.Module",
            wrapper(
                Entry(module),  # torch-xla wants a forward, which a module with nothing but steps has not
                mesh=self.mesh,
                shard_output=_sharding.shard_output,
                auto_wrap_policy=None if self._policy is None or is_wrapped else self._policy(),
            ),
        )

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``; those made before ``place`` now hold the parameters on the devices."""
        return self._place.follow(optimizers)

    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        """Step, spread what the optimizer keeps for each parameter as that is spread, and run what was recorded."""
        result: Any = optimizer.step() if closure is None else optimizer.step(closure)  # type: ignore[arg-type]
        if id(optimizer) not in self._with_sharded_state and optimizer.state:
            _sharding.shard_optimizer_state(optimizer, self.mesh)
            self._with_sharded_state.add(id(optimizer))
        sync()
        return cast("object", result)

    def process_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """Upload batches while the devices compute, each device its part."""
        return self._place.uploading(loader, sharding=_sharding.ByFirstDimension(self.mesh))

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["full", "sharded"]:
        """Whether a checkpoint is one file or a folder."""
        return self._asked_kind or self._default_kind

    def default_state_kind(self, kind: Literal["full", "sharded"]) -> None:
        """Let ``state_kind`` be ``kind`` unless the user has said otherwise."""
        self._default_kind = kind

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name: on the CPU, or where it is."""
        state = {_canonical(name): value for name, value in _original(module).state_dict().items()}
        return to_host(state) if full else state

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> Outcome:
        """Load either kind.

        Raises:
            RuntimeError: names or shapes do not fit; with ``strict`` also where a name is missing or unknown.
        """
        original = _original(module)
        own = {_canonical(name): name for name in original.state_dict()}
        named = {own.get(name, name): value for name, value in state.items()}
        specs = _sharding.marks_of(original)
        outcome: Any = original.load_state_dict(named, strict=strict)
        _sharding.mark_again(original, specs)
        sync()
        return Outcome(list(outcome.missing_keys), list(outcome.unexpected_keys))

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """``optimizer.state_dict()``, on the CPU or where it is."""
        state = cast("dict[str, object]", optimizer.state_dict())
        return to_host(state) if full else state

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load either kind, and spread it as the parameters are."""
        # Optimizers take tensors as they are: two would go on with the same one.
        own = map_instances(Tensor, lambda one: one.detach().clone(), state)
        optimizer.load_state_dict(cast("dict[str, Any]", own))
        _sharding.shard_optimizer_state(optimizer, self.mesh)
        self._with_sharded_state.add(id(optimizer))
        sync()

    def teardown(self) -> None:
        """Let go of the devices. The process stays in SPMD mode: torch-xla has no way back."""
        self._place.leave()
        self._mesh = None
        self._with_sharded_state.clear()


def _original(module: nn.Module) -> nn.Module:
    """The user's module of one that ``place`` has wrapped."""
    entry: object = getattr(module, "_orig_module", None)
    return entry.module if isinstance(entry, Entry) else module


def _canonical(name: str) -> str:
    """``name`` without the marks of layers that are wrapped."""
    return re.sub(r"(^|\.)_orig_module(?=\.)", "", name).lstrip(".")
