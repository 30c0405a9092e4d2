"""Model parallel: users place their modules on one mesh by torch's tensor parallel plans and ``fully_shard``."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.weak import WeakIdKeyDictionary

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError
from fulmen_strategies._mesh import MeshSizes
from fulmen_strategies._module_init import created_on
from fulmen_strategies._pipeline import Stages, stage_group
from fulmen_strategies._process_group import ProcessGroupMembership
from fulmen_strategies._sharded.gradients import clip_by_norm, clip_by_value
from fulmen_strategies._sharded.layout import laid_out_like, local
from fulmen_strategies._sharded.materialise import is_on_meta, materialise
from fulmen_strategies._sharded.open_gradients import has_open_gradients, load_open_gradients, open_gradients
from fulmen_strategies._sharded.states import (
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from fulmen_strategies.collectives import TorchCollectives
from fulmen_strategies.launchers._rank import become_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from fulmen_protocols.precision import PrecisionPlan
    from fulmen_protocols.topology import Topology

    Parallelize = Callable[[nn.Module, DeviceMesh], nn.Module]
    Size = int | Literal["auto"]

__all__ = ["ModelParallelStrategy"]

_DEFAULT_TIMEOUT = timedelta(minutes=30)


class ModelParallelStrategy:
    """Tensor parallel, FSDP2, both on one mesh, and torch's context and pipeline parallelism.

    The processes form a mesh with the dimensions ``"data_parallel"`` and ``"tensor_parallel"``. Where a module's layers
    go is the user's decision, written with torch's own functions (``parallelize_module``, ``fully_shard``): for the
    Trainer in ``LightningModule.configure_model``, where ``self.device_mesh`` is that mesh; for Fabric in
    ``parallelize_fn``. Data are split along ``"data_parallel"`` alone: all other ranks of a mesh read the same batch,
    and draw the same random numbers.

    What lies on no mesh starts with rank 0's values on every rank. A parameter to train must be averaged over the
    data-parallel ranks by ``fully_shard``; one that would not be is an error.

    Args:
        parallelize_fn: ``(module, device_mesh) -> module``, called once for each module when it is set up. None: the
            module has placed itself in ``configure_model``.
        data_parallel_size: processes along ``"data_parallel"``; ``"auto"``: the number of nodes, or what the other
            sizes leave.
        tensor_parallel_size: processes along ``"tensor_parallel"``; ``"auto"``: the devices of a node, or what the
            other sizes leave.
        save_distributed_checkpoint: whether checkpoints are folders to which every rank writes its shards. False: one
            file, gathered on rank 0.
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; ``None``: torch's default for the device.
        timeout: after which a rank that waits for others in a collective gives up.
        context_parallel_size: processes along a further dimension ``"context_parallel"``, for
            ``torch.distributed.tensor.experimental.context_parallel``. With 1 the mesh has no such dimension.
        pipeline_parallel_size: the same for ``"pipeline_parallel"`` and ``torch.distributed.pipelining``.

    Raises:
        MisconfigurationException: a size that is no whole number of at least 1.
        MisconfigurationTypeError: ``parallelize_fn`` cannot be called.
    """

    def __init__(
        self,
        parallelize_fn: Parallelize | None = None,
        data_parallel_size: Size = "auto",
        tensor_parallel_size: Size = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = _DEFAULT_TIMEOUT,
        *,
        context_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
    ) -> None:
        if parallelize_fn is not None and not callable(cast("object", parallelize_fn)):
            raise MisconfigurationTypeError(
                f"ModelParallelStrategy got parallelize_fn={parallelize_fn!r}, which cannot be called: give a function "
                "of (module, device_mesh) that returns the module, and sizes by name: data_parallel_size=..., "
                "tensor_parallel_size=..."
            )
        self._parallelize = parallelize_fn
        self._sizes = MeshSizes(
            type(self).__name__,
            data_parallel=data_parallel_size,
            tensor_parallel=tensor_parallel_size,
            context_parallel=context_parallel_size,
            pipeline_parallel=pipeline_parallel_size,
        )
        self._saves_shards = save_distributed_checkpoint
        self._backend = process_group_backend
        self._timeout = _DEFAULT_TIMEOUT if timeout is None else timeout
        self._device: torch.device | None = None
        self._mesh: DeviceMesh | None = None
        self._membership = ProcessGroupMembership()
        self._collectives: TorchCollectives | None = None
        # Of a pipeline: among the ranks that hold this rank's stage, and the state of all of them.
        self._of_stage: TorchCollectives | None = None
        self._stages: Stages | None = None
        # Modules that parallelize_fn has placed; a second fit must not place them again.
        self._placed = WeakIdKeyDictionary()
        # Parameters before they were placed, to those that took their place: for optimizers made earlier.
        self._replaced = WeakIdKeyDictionary()

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def launcher(self) -> str:
        """``"local"``."""
        return "local"

    @property
    def root_device(self) -> torch.device:
        """The device of this process.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        if self._device is None:
            raise _too_early("root_device")
        return self._device

    @property
    def collectives(self) -> TorchCollectives:
        """Communication among all ranks, whatever their place on the mesh.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        if self._collectives is None:
            raise _too_early("collectives")
        return self._collectives

    @property
    def _own_stage(self) -> TorchCollectives:
        return self.collectives if self._of_stage is None else self._of_stage

    @property
    def device_mesh(self) -> DeviceMesh:
        """All processes, with the dimensions ``"data_parallel"`` and ``"tensor_parallel"`` (and those asked for).

        Raises:
            RuntimeError: ``setup_environment`` has not run yet: there are no processes.
        """
        if self._mesh is None:
            raise _too_early("device_mesh")
        return self._mesh

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the data this rank reads: the same on all ranks that differ in other dimensions only."""
        return self.device_mesh["data_parallel"].get_local_rank()

    @property
    def data_parallel_size(self) -> int:
        """Number of parts into which the data are split."""
        return self.device_mesh["data_parallel"].size()

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Refuse a number of processes that is not the product of the sizes.

        Raises:
            MisconfigurationException: it is not.
        """
        self._sizes.shape(len(devices), num_nodes)

    def check_precision(self, plan: PrecisionPlan) -> None:
        """Refuse scaled losses in a pipeline, whose schedule runs backward by itself.

        Raises:
            MisconfigurationException: ``plan`` needs a scaler, and there is a pipeline.
        """
        if plan["scaler"] != "none" and self._sizes.has_stages:
            raise MisconfigurationException(
                "ModelParallelStrategy got pipeline_parallel_size above 1 and a precision that scales losses: a "
                "pipeline's schedule runs backward by itself, past the scaler. Use precision='bf16-mixed' or '32-true'."
            )

    def setup_environment(self, topology: Topology) -> None:
        """Join the process group and make the mesh. Calling it again changes nothing.

        Raises:
            MisconfigurationException: an existing group has another rank or size than ``topology``, or the product of
                the sizes is not the number of processes.
            BackendUnavailable: this build of torch lacks the backend.
        """
        if self._mesh is not None:
            return
        self.check_world(topology.devices, topology.num_nodes)
        become_rank()  # a run may leave the launcher out where the processes exist already
        self._membership.join(topology, self._backend, self._timeout)
        self._device = topology.device
        self._collectives = TorchCollectives(topology.device)
        self._mesh = self._sizes.make(topology.device, len(topology.devices), topology.num_nodes)
        self._of_stage = self._collectives
        if _has_stages(self._mesh):
            self._of_stage = TorchCollectives(topology.device, stage_group(self._mesh))
            self._stages = Stages(self._mesh, self._collectives, self._of_stage, topology.device)

    def teardown(self) -> None:
        """Leave the process group if this strategy has made it. May be called twice."""
        self._membership.leave()
        self._collectives = self._of_stage = self._stages = None
        self._device = None
        self._mesh = None
        self._placed.clear()
        self._replaced.clear()

    # -- modules ------------------------------------------------------------------------------------------------------

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Create modules on the device; with ``empty`` on the meta device, to be given memory when they are placed."""
        return torch.device("meta") if empty else created_on(self.root_device, empty=False)

    def check_module(self, module: nn.Module) -> None:
        """Refuse a module that nobody would parallelize, or that FSDP1 has wrapped.

        Raises:
            MisconfigurationTypeError: it has no ``configure_model`` of its own and there is no ``parallelize_fn``.
        """
        _refuse_fsdp1(module)
        has_placed_itself = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        if self._parallelize is None and not has_placed_itself and not _overrides_configure_model(module):
            raise MisconfigurationTypeError(
                f"ModelParallelStrategy was asked to run {type(module).__name__}, which does not override "
                "configure_model: parallelize its layers there, on self.device_mesh, or give the strategy a "
                "parallelize_fn."
            )

    def place(self, module: nn.Module) -> nn.Module:
        """Parallelize ``module`` if that is this strategy's part, give it memory, and move the rest to the device.

        Raises:
            MisconfigurationTypeError: ``parallelize_fn`` returned no module, or FSDP1 wrappers are in it.
        """
        if module in self._placed:
            return cast("nn.Module | None", self._placed[module]()) or module
        _refuse_fsdp1(module)
        before = dict(module.named_parameters())
        placed = module
        if self._parallelize is not None:
            self._share_values(module)  # each rank is about to keep a part of its own
            placed = self._parallelized(module, self._parallelize)
        if is_on_meta(placed):
            materialise(placed, self.root_device, self._own_stage)
        placed.to(self.root_device)
        self._share_values(placed)
        self._remember(module, placed, before)
        return placed

    def _parallelized(self, module: nn.Module, parallelize: Parallelize) -> nn.Module:
        placed = cast("object", parallelize(module, self.device_mesh))
        if not isinstance(placed, nn.Module):
            raise MisconfigurationTypeError(
                f"parallelize_fn of ModelParallelStrategy returned {_kind(placed)} for {type(module).__name__}: return "
                "the module."
            )
        _refuse_fsdp1(placed)
        return placed

    def _share_values(self, module: nn.Module) -> None:
        """Make equal what is taken for equal: along dimensions on which a tensor is whole, the first rank's counts.

        A plan leaves layers out, and a user's random state may differ between ranks.
        """
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:
                for collectives in self._replicas_of(tensor):
                    collectives.broadcast(local(tensor.detach()))

    def _replicas_of(self, tensor: Tensor) -> Iterator[TorchCollectives]:
        """The groups of ranks that hold the same part of ``tensor``."""
        own = tensor.device_mesh if isinstance(tensor, DTensor) else None
        spread = set[int]() if own is None else _ranks(own)
        for name in _dimensions(self.device_mesh):
            ranks = self.device_mesh[name]
            # A stage of a pipeline is a module of its own.
            if name != "pipeline_parallel" and ranks.size() > 1 and not spread >= _ranks(ranks):
                yield TorchCollectives(self.root_device, ranks.get_group())
        if isinstance(tensor, DTensor):
            for axis, placement in enumerate(tensor.placements):
                if isinstance(placement, Replicate) and tensor.device_mesh.size(axis) > 1:
                    yield TorchCollectives(self.root_device, tensor.device_mesh.get_group(axis))

    def _remember(self, module: nn.Module, placed: nn.Module, before: dict[str, nn.Parameter]) -> None:
        if self._parallelize is not None:
            self._placed[module] = weakref.ref(placed)
        after = {_canonical(name): parameter for name, parameter in placed.named_parameters()}
        for name, parameter in before.items():
            now = after.get(_canonical(name))
            if now is not None and now is not parameter:
                self._replaced[parameter] = now

    # -- steps --------------------------------------------------------------------------------------------------------

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """The module's method ``name``; where ``fully_shard`` was applied to the whole module, within its hooks."""
        if name == "forward":
            return placed
        if isinstance(placed, FSDPModule) and name not in vars(placed):
            register_fsdp_forward_method(placed, name)
        return cast("Callable[..., object]", getattr(placed, name))

    @contextlib.contextmanager
    def no_sync(self, module: nn.Module) -> Generator[None]:
        """Within the block, gradients stay where they are, whole on each data-parallel rank, until a later backward.

        So a window costs one reduction, and memory for the unsharded gradients. Sums over tensor-parallel ranks belong
        to the computation and happen all the same.
        """
        sharded = [one for one in module.modules() if isinstance(one, FSDPModule)]
        for one in sharded:
            one.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for one in sharded:
                one.set_requires_gradient_sync(True, recurse=False)

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``; those made before the module was placed get the parameters that it has now.

        What they know of them, where they have taken steps, is laid out in the same way.

        Raises:
            MisconfigurationException: a parameter to train would differ between data-parallel ranks.
        """
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for index, before in enumerate(cast("list[Tensor]", group["params"])):
                    if before in self._replaced:
                        group["params"][index] = now = cast("Tensor", self._replaced[before])
                        if before in optimizer.state:
                            optimizer.state[now] = _state_laid_out_like(now, optimizer.state.pop(before))
        self._refuse_unreduced(module, optimizers)
        return optimizers

    def _refuse_unreduced(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Each parameter to train must lie on a mesh that holds all ranks which read other data."""
        peers = set[int]()
        for name in ("data_parallel", "context_parallel"):
            if name in _dimensions(self.device_mesh):
                peers |= _ranks(self.device_mesh[name])
        if len(peers) == 1:
            return
        names = {id(parameter): _canonical(name) for name, parameter in module.named_parameters()}
        for parameter in itertools.chain(*map(_parameters, optimizers)):
            reduced = isinstance(parameter, DTensor) and peers <= _ranks(parameter.device_mesh)
            if parameter.requires_grad and not reduced:
                kinds = " and ".join(
                    f"{name}_size={self.device_mesh[name].size()}"
                    for name in ("data_parallel", "context_parallel")
                    if name in _dimensions(self.device_mesh) and self.device_mesh[name].size() > 1
                )
                raise MisconfigurationException(
                    f"with {kinds} the gradient of {names.get(id(parameter), 'a parameter')!r} of "
                    f"{type(module).__name__} would be each rank's own, because nothing spreads it over those "
                    "ranks: after tensor parallel plans call fully_shard(module, mesh=device_mesh['data_parallel']) on "
                    "the layers and on the module that holds them, or use tensor parallel alone."
                )

    def clip_grad_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        *,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Clip to the norm that one process would find, whatever meshes the gradients lie on.

        Source: Pascanu et al. 2013, algorithm 1.
        """
        clip = clip_by_norm if self._stages is None else self._stages.clip_by_norm
        return clip(_parameters(optimizer), max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite)

    def clip_grad_value(self, module: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        """Clamp every gradient element to ``[-clip_value, clip_value]`` in place."""
        clip_by_value(_parameters(optimizer), clip_value)

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["full", "sharded"]:
        """As ``save_distributed_checkpoint`` says; of a pipeline, whose ranks hold different modules, ``"full"``."""
        return "sharded" if self._saves_shards and not self._sizes.has_stages else "full"

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name. ``full``: whole CPU tensors on rank 0, empty elsewhere; otherwise DTensors."""
        _reshard(module)
        state = module_state(module, full=full, rank=self._own_stage.rank)
        named = {_canonical(name): value for name, value in state.items()}
        return named if self._stages is None or not full else self._stages.join_states(named)

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> object:
        """Load what ``module_state`` gave, of either kind, saved by any strategy on any number of ranks."""
        _reshard(module)
        here = {_canonical(name): name for name in module.state_dict()}
        named = {_canonical(name): value for name, value in state.items()}
        if self._stages is not None:
            named = self._stages.own_part(named, set(here))
        named = {here.get(name, name): value for name, value in named.items()}
        return load_module_state(module, named, self._own_stage, strict=strict)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """Optimizer state in torch's layout; ``full`` as in ``module_state``."""
        state = optimizer_state(optimizer, full=full, rank=self._own_stage.rank)
        return state if self._stages is None or not full else self._stages.join_optimizers(state)

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load what ``optimizer_state`` gave, of either kind, saved by any strategy on any number of ranks."""
        if self._stages is not None:
            state = self._stages.own_optimizer(state, [len(group["params"]) for group in optimizer.param_groups])
        load_optimizer_state(optimizer, state, self._own_stage)

    def has_open_gradients(self, module: nn.Module) -> bool:
        """Whether this rank holds any gradient, reduced or not."""
        return has_open_gradients(module, module)

    def open_gradients(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """The state of every rank's gradients; ``full`` as in ``module_state``."""
        _reshard(module)
        return open_gradients(module, module, self.collectives, full=full)

    def load_open_gradients(self, module: nn.Module, state: Mapping[str, object]) -> None:
        """Load what ``open_gradients`` gave.

        Raises:
            CheckpointError: ranks have gradients of their own in it, and there are other ranks now.
        """
        _reshard(module)
        load_open_gradients(module, module, self.collectives, state)


def _state_laid_out_like(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: laid_out_like(value, parameter).to(value.dtype)
        if isinstance(value, torch.Tensor) and value.dim() and value.shape == parameter.shape
        else value
        for name, value in state.items()
    }


def _canonical(name: str) -> str:
    """Without what ``torch.compile`` puts before the names inside a compiled module."""
    return name.replace("_orig_mod.", "")


def _reshard(module: nn.Module) -> None:
    """Register shards as the module's parameters again, where an evaluation has left them gathered."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _dimensions(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


def _has_stages(mesh: DeviceMesh) -> bool:
    return "pipeline_parallel" in _dimensions(mesh)


def _ranks(mesh: DeviceMesh) -> set[int]:
    return set(cast("list[int]", mesh.mesh.flatten().tolist()))


def _overrides_configure_model(module: nn.Module) -> bool:
    """Whether a class of ``module``'s replaces the ``configure_model`` that it has inherited."""
    method = getattr(module, "configure_model", None)
    if method is None:
        return False
    declared = [vars(kind)["configure_model"] for kind in type(module).__mro__ if "configure_model" in vars(kind)]
    return len(declared) != 1 or getattr(method, "__func__", method) is not declared[0]


def _refuse_fsdp1(module: nn.Module) -> None:
    modules = cast("Iterator[tuple[str, nn.Module]]", module.named_modules())
    found = next((name for name, one in modules if isinstance(one, FullyShardedDataParallel)), None)
    if found is not None:
        raise MisconfigurationTypeError(
            f"ModelParallelStrategy was given {type(module).__name__}, whose {found or 'root'!r} is wrapped in "
            "torch.distributed.fsdp.FullyShardedDataParallel (FSDP1): use torch.distributed.fsdp.fully_shard instead."
        )


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _too_early(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} of ModelParallelStrategy is unknown until setup_environment has run: call it first. In a "
        "LightningModule self.device_mesh is there from setup on."
    )
