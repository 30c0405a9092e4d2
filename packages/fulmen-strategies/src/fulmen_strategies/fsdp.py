"""FSDP: every rank keeps a part of each parameter, and gathers a layer's while that layer computes (FSDP2)."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import enable_wrap

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError
from fulmen_strategies._module_init import created_on
from fulmen_strategies._rank_place import DEFAULT_TIMEOUT, OnRanks, RankPlace
from fulmen_strategies._sharded import arguments, gradients, states, units
from fulmen_strategies._sharded.casting import Casting
from fulmen_strategies._sharded.checks import wrapped_by_first_fsdp
from fulmen_strategies._sharded.entry import ShardedEntry, sharded_entry
from fulmen_strategies._sharded.materialise import is_on_meta, materialise
from fulmen_strategies._sharded.open_gradients import has_open_gradients, load_open_gradients, open_gradients
from fulmen_strategies._sharded.replaced import Replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import timedelta

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy
    from torch.optim import Optimizer

    from fulmen_protocols.precision import PrecisionPlan
    from fulmen_protocols.topology import Topology
    from fulmen_strategies._sharded.arguments import StrategyName
    from fulmen_strategies._sharded.units import Policy

__all__ = ["FSDPStrategy", "cpu_offload"]


class FSDPStrategy(OnRanks):
    """Fully sharded data parallel training by ``torch.distributed.fsdp.fully_shard`` (FSDP2).

    Parameters, gradients and optimizer state are spread over the ranks. A unit (what ``auto_wrap_policy`` chooses, and
    what remains) is gathered before it computes and freed afterwards. It takes the arguments of Lightning's strategy
    for torch's first FSDP; those that mean nothing any more are refused.

    Args:
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; ``None``: torch's default for the device.
        timeout: after which a rank that waits for others in a collective gives up.
        cpu_offload: keep parameters, gradients and optimizer state in host memory. Needs an accelerator.
        mixed_precision: what is gathered and reduced in which dtype, in place of what ``precision=`` says.
        auto_wrap_policy: the units: a set of module classes, a function of a module, or a policy of
            ``torch.distributed.fsdp.wrap``. ``None``: one unit, so that nothing is saved but optimizer state.
        activation_checkpointing: older form of the next: a class or a list of them.
        activation_checkpointing_policy: which modules forget their activations and compute them again in backward.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"`` keeps parameters gathered until backward has used them;
            ``"NO_SHARD"`` replicates; ``"HYBRID_SHARD"`` shards within groups of ranks and replicates over the groups.
        state_dict_type: whether checkpoints are one ``"full"`` file or ``"sharded"`` folders. ``None``: full for the
            Trainer, sharded for Fabric. Both kinds are loaded in any case.
        device_mesh: (replicas, shards), or a ``DeviceMesh`` of one or two dimensions.
        reduce_accumulated: when gradients of several batches accumulate: ``"once"`` keeps whole gradients on each rank
            until the last batch, and communicates once; ``"each"`` reduces after every batch, and keeps shards.
        kwargs: ``sync_module_states`` (start with rank 0's weights; default True), ``forward_prefetch`` (gather one
            unit ahead in forward, on the order of the module tree), ``ignored_modules``, ``ignored_states``.

    Raises:
        MisconfigurationException: an argument that cannot be honoured.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        *,
        cpu_offload: bool | CPUOffload | OffloadPolicy | None = None,
        mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
        auto_wrap_policy: Policy | None = None,
        activation_checkpointing: type[nn.Module] | list[type[nn.Module]] | None = None,
        activation_checkpointing_policy: Policy | None = None,
        sharding_strategy: StrategyName | ShardingStrategy = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] | None = None,
        device_mesh: tuple[int, int] | DeviceMesh | None = None,
        reduce_accumulated: Literal["once", "each"] = "once",
        **kwargs: Any,
    ) -> None:
        units.check_policy("auto_wrap_policy", auto_wrap_policy)
        units.check_policy("activation_checkpointing_policy", activation_checkpointing_policy)
        if state_dict_type not in (None, "full", "sharded"):
            raise MisconfigurationException(
                f"FSDPStrategy got state_dict_type={state_dict_type!r}. Give 'full' (one file) or 'sharded' (a folder)."
            )
        if reduce_accumulated not in ("once", "each"):
            raise MisconfigurationException(
                f"FSDPStrategy got reduce_accumulated={reduce_accumulated!r}. Give 'once' (one communication for each "
                "update) or 'each' (less memory)."
            )
        self._rank = RankPlace("FSDPStrategy", process_group_backend, timeout)
        self._offload = arguments.offload(cpu_offload)
        self._policy = auto_wrap_policy
        self._recomputed = arguments.recomputed(activation_checkpointing, activation_checkpointing_policy)
        self._sharding = arguments.sharding(sharding_strategy, device_mesh, has_policy=auto_wrap_policy is not None)
        self._state_kind: Literal["full", "sharded"] | None = state_dict_type
        self._default_state_kind: Literal["full", "sharded"] = "full"
        self._reduces_once = reduce_accumulated == "once"
        self._options = arguments.options(kwargs)
        self._own_precision = arguments.mixed_precision(mixed_precision)
        self._casting = Casting(policy=self._own_precision)
        self._mesh: DeviceMesh | None = None
        self._replaced = Replaced()

    # -- before anything starts ---------------------------------------------------------------------------------------

    @property
    def launcher(self) -> str:
        """``"local"``."""
        return "local"

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Compare the arguments with the devices of each node.

        Raises:
            MisconfigurationException: the mesh has another number of ranks, or there is no accelerator to offload from.
        """
        self._sharding.check(len(devices), num_nodes)
        if isinstance(self._offload, CPUOffloadPolicy) and devices[0].type == "cpu":
            raise MisconfigurationException(
                f"FSDPStrategy got cpu_offload, but the run is on {devices[0].type!r}, where everything is in host "
                "memory already. Leave it out, or use an accelerator: accelerator='gpu'."
            )

    def apply_precision_plan(self, plan: PrecisionPlan) -> None:
        """Take over the dtypes of parameters, computation and reduction.

        Raises:
            MisconfigurationException: a dtype that cannot be sharded and computed in.
        """
        self._casting = Casting(plan, self._own_precision)

    def default_state_kind(self, kind: Literal["full", "sharded"]) -> None:
        """Use ``kind`` unless ``state_dict_type`` was given."""
        self._default_state_kind = kind

    @property
    def state_kind(self) -> Literal["full", "sharded"]:
        """What checkpoints hold."""
        return self._default_state_kind if self._state_kind is None else self._state_kind

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh over which parameters are spread.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        if self._mesh is None:
            raise self._rank.too_early("device_mesh")
        return self._mesh

    def setup_environment(self, topology: Topology) -> None:
        """Join the process group, or take over the one that exists. Calling it again changes nothing.

        Raises:
            MisconfigurationException: the arguments do not fit the processes, or an existing group does not.
            BackendUnavailable: this build of torch lacks the backend.
        """
        self.check_world(topology.devices, topology.num_nodes)
        self._rank.take(topology)
        if self._mesh is None:
            self._mesh = self._sharding.make_mesh(topology.device.type, topology.world_size, topology.num_nodes)
            self._rank.meet()

    def teardown(self) -> None:
        """Leave the process group if this strategy has made it. May be called twice."""
        self._mesh = None
        self._rank.leave()
        self._replaced.forget()

    # -- modules ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def module_context(self, *, empty: bool) -> Generator[None]:
        """Create modules on the device; with ``empty`` on the meta device, where they need no memory.

        Within, ``torch.distributed.fsdp.wrap.wrap(module)`` makes ``module`` a unit.
        """
        device = torch.device("meta") if empty else self.root_device
        with enable_wrap(wrapper_cls=units.mark_as_unit), created_on(device, empty=empty):
            yield

    def place(self, module: nn.Module) -> nn.Module:
        """Shard ``module`` in place and return its entry; all ranks start with the weights of rank 0.

        A module that was sharded before, by this strategy, is returned as it is. What is on the meta device gets its
        values from ``reset_parameters``, layer by layer.

        Raises:
            MisconfigurationException: it is wrapped by torch's first FSDP.
        """
        return self._placed(module, self.root_device)

    def place_for_plan(self, module: nn.Module, device: torch.device) -> tuple[nn.Module, dict[str, int]]:
        """As ``place``, with the dtypes in which weights are gathered on ``device``, which need not be there."""
        return self._placed(module, device), {}

    def _placed(self, module: nn.Module, planned: torch.device) -> nn.Module:
        known = sharded_entry(module)
        if known is not None:
            return known
        _refuse_first_fsdp(module)
        mesh, device = self.device_mesh, self.root_device
        self._casting.store(module)
        ignored = self._options.ignored_parameters()
        if self._options.sync_module_states:
            self._share_values(module)
        before = dict(module.named_parameters())
        chosen = self._units_of(module, planned)
        if self._recomputed is not None:
            units.recompute(self._recomputed, module)
        common: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self._sharding.frees_after_forward,
            "offload_policy": self._offload,
            "ignored_params": ignored,
        }
        inner = self._casting.policy(planned, is_root=False)
        for unit in chosen:
            fully_shard(unit, mp_policy=self._kept_single(unit) or inner, **common)
        entry = ShardedEntry(module, self._casting, device)
        fully_shard(entry, mp_policy=self._casting.policy(planned, is_root=True), **common)
        if self._options.forward_prefetch:
            _prefetch_in_order([unit for unit in entry.modules() if isinstance(unit, FSDPModule)])
        self._fill(module, ignored)
        self._replaced.note(before, module)
        return entry

    def _units_of(self, module: nn.Module, device: torch.device) -> list[nn.Module]:
        """What is sharded on its own, inner modules first."""
        chosen = units.marked_units(module)
        if any(isinstance(one, FSDPModule) for one in module.modules()):
            if self._policy is not None:
                warnings.warn(
                    f"auto_wrap_policy is not applied: {type(module).__name__} has modules that fully_shard was "
                    "applied to already.",
                    stacklevel=2,
                )
            return []
        if self._policy is not None:
            if chosen:
                warnings.warn(
                    f"auto_wrap_policy is not applied: {type(module).__name__} has modules in wrap() already.",
                    stacklevel=2,
                )
            else:
                chosen = units.chosen(self._policy, module)
        if self._casting.gathers_in_half(device):
            norms = [one for one in module.modules() if _is_batch_norm(one) and one not in chosen and one is not module]
            chosen = [one for one in reversed(list(module.modules())) if one in chosen or one in norms]
        return units.without_shared(chosen, module)

    def _kept_single(self, unit: nn.Module) -> MixedPrecisionPolicy | None:
        # Running statistics are buffers in float32, which batch norm takes with float32 weights only.
        return MixedPrecisionPolicy() if _is_batch_norm(unit) and self._own_precision is None else None

    def _share_values(self, module: nn.Module) -> None:
        if self.collectives.world_size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.is_meta:
                    self.collectives.broadcast(tensor)

    def _fill(self, module: nn.Module, ignored: set[nn.Parameter]) -> None:
        """Values for what is on the meta device, and the device for what is no unit's."""
        device = self.root_device
        if is_on_meta(module):
            offloaded = isinstance(self._offload, CPUOffloadPolicy)
            materialise(module, torch.device("cpu") if offloaded else device, self.collectives)
            for layer in module.modules():
                for name, buffer in layer.named_buffers(recurse=False):
                    layer._buffers[name] = buffer.to(device)  # pyright: ignore[reportPrivateUsage]
        for parameter in ignored:
            parameter.data = parameter.data.to(device)
        torchmetrics: Any = sys.modules.get("torchmetrics")
        if torchmetrics is not None:  # metrics keep their state in plain attributes
            for metric in module.modules():
                if isinstance(metric, torchmetrics.Metric):
                    metric.to(device)

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """The original module's method ``name``, run with whole parameters."""
        entry = _entry(placed)
        if name == "forward":
            return entry
        method = getattr(entry.module, name)

        def through_entry(*args: object, **kwargs: object) -> object:
            return entry.run(method, *args, **kwargs)

        return through_entry

    def bind_manual_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """As ``bind_method``, for a method that itself runs backward, each time within ``manual_backward``."""
        entry = _entry(placed)
        method = getattr(entry.module, name)

        def through_entry(*args: object, **kwargs: object) -> object:
            return entry.run_manual(method, *args, **kwargs)

        return through_entry

    def manual_backward(self, placed: nn.Module, loss: Tensor) -> AbstractContextManager[None]:
        """Within the block, ``loss.backward()`` in a manually bound method reduces its gradients over ranks."""
        return _entry(placed).manual_backward(loss)

    @contextlib.contextmanager
    def no_sync(self, module: nn.Module) -> Generator[None]:
        """Within the block gradients stay whole and local, unless ``reduce_accumulated="each"``."""
        if not self._reduces_once:
            yield
            return
        sharded = _entry(module).sharded
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within the block every rank holds the whole model: ranks may run different numbers of forward passes."""
        return _entry(module).gathered()

    # -- optimizers ---------------------------------------------------------------------------------------------------

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``; one that was made before ``place`` gets the sharded parameters, and its state, too."""
        entry = _entry(module)
        for optimizer in optimizers:
            self._replaced.hand_over(optimizer)
            _notify(entry, optimizer)
        return optimizers

    def clip_grad_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        *,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Clip in place to ``max_norm`` and return the norm before clipping, shape ``()``, equal on every rank."""
        return gradients.clip_by_norm(
            gradients.parameters_of(optimizer), max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
        )

    def clip_grad_value(self, module: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        """Clamp every gradient element to ``[-clip_value, clip_value]`` in place."""
        gradients.clip_by_value(gradients.parameters_of(optimizer), clip_value)

    # -- state --------------------------------------------------------------------------------------------------------

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name; ``full``: whole CPU tensors on rank 0, empty elsewhere; otherwise DTensors."""
        entry = _entry(module)
        states.reshard(entry)
        return states.module_state(entry.module, full=full, rank=self.collectives.rank)

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> object:
        """Load what ``module_state`` gave, of either kind, from any number of ranks; returns what did not meet."""
        entry = _entry(module)
        states.reshard(entry)
        return states.load_module_state(entry.module, state, self.collectives, strict=strict)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """Optimizer state in torch's ``state_dict`` layout; ``full`` as in ``module_state``."""
        return states.optimizer_state(optimizer, full=full, rank=self.collectives.rank)

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load what ``optimizer_state`` gave, of either kind, from any number of ranks."""
        states.load_optimizer_state(optimizer, state, self.collectives)

    def has_open_gradients(self, module: nn.Module) -> bool:
        """Whether this rank holds any gradient, reduced or not."""
        entry = _entry(module)
        return has_open_gradients(entry, entry.module)

    def open_gradients(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """The state of every rank's gradients; ``full`` as in ``module_state``."""
        entry = _entry(module)
        return open_gradients(entry, entry.module, self.collectives, full=full)

    def load_open_gradients(self, module: nn.Module, state: Mapping[str, object]) -> None:
        """Load what ``open_gradients`` gave.

        Raises:
            CheckpointError: ranks have gradients of their own in it, and there are other ranks now.
        """
        entry = _entry(module)
        load_open_gradients(entry, entry.module, self.collectives, state)


def cpu_offload(**options: Any) -> FSDPStrategy:
    """An FSDPStrategy with ``cpu_offload=True``, registered as ``"fsdp_cpu_offload"``."""
    return FSDPStrategy(cpu_offload=True, **options)


def _refuse_first_fsdp(module: nn.Module) -> None:
    name = wrapped_by_first_fsdp(module)
    if name is not None:
        raise MisconfigurationException(
            f"{name or type(module).__name__} is wrapped in torch's FullyShardedDataParallel, but FSDPStrategy "
            "shards with fully_shard. Remove the wrapper: give auto_wrap_policy, or call "
            "torch.distributed.fsdp.wrap.wrap in configure_model."
        )


def _is_batch_norm(module: nn.Module) -> bool:
    base = cast("type[nn.Module]", nn.BatchNorm1d.__base__)
    return isinstance(module, base) and any(True for _ in module.parameters(recurse=False))


def _prefetch_in_order(sharded: list[FSDPModule]) -> None:
    for unit, following in itertools.pairwise(sharded):
        unit.set_modules_to_forward_prefetch([following])


def _entry(placed: nn.Module) -> ShardedEntry:
    entry = sharded_entry(placed)
    if entry is None:
        raise MisconfigurationTypeError(
            f"FSDPStrategy was given a {type(placed).__name__} that it has not placed. Call place() first."
        )
    return entry


def _notify(entry: ShardedEntry, optimizer: Optimizer) -> None:
    """Tell ``entry`` of each step, once for each optimizer."""

    def tell(*_: object) -> None:
        entry.after_step()

    if "_fulmen_tells" not in optimizer.__dict__:
        optimizer.__dict__["_fulmen_tells"] = optimizer.register_step_post_hook(tell)
