"""Model parallel: users place their modules on one mesh by torch's tensor parallel plans and ``fully_shard``."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError
from fulmen_strategies._kept_gradients import keep_gradients
from fulmen_strategies._mesh import MeshSizes
from fulmen_strategies._module_init import created_on
from fulmen_strategies._pipeline import Stages, stage_group
from fulmen_strategies._rank_place import DEFAULT_TIMEOUT, OnRanks, RankPlace
from fulmen_strategies._sharded import states
from fulmen_strategies._sharded.checks import overrides_configure_model, refuse_unreduced, wrapped_by_first_fsdp
from fulmen_strategies._sharded.gradients import clip_by_norm, clip_by_value, parameters_of
from fulmen_strategies._sharded.materialise import is_on_meta, materialise
from fulmen_strategies._sharded.open_gradients import has_open_gradients, load_open_gradients, open_gradients
from fulmen_strategies._sharded.replaced import Replaced
from fulmen_strategies._sharded.replicas import dimensions, share_values
from fulmen_strategies.collectives import TorchCollectives

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import timedelta

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from fulmen_protocols.precision import PrecisionPlan
    from fulmen_protocols.topology import Topology

    Parallelize = Callable[[nn.Module, DeviceMesh], nn.Module]
    Size = int | Literal["auto"]

__all__ = ["ModelParallelStrategy"]


class ModelParallelStrategy(OnRanks):
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
        timeout: timedelta | None = DEFAULT_TIMEOUT,
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
        self._rank = RankPlace(
            "ModelParallelStrategy", process_group_backend, timeout,
            hint=" In a LightningModule self.device_mesh is there from setup on.",
        )  # fmt: skip
        self._mesh: DeviceMesh | None = None
        # Of a pipeline: among the ranks that hold this rank's stage, and the state of all of them.
        self._of_stage: TorchCollectives | None = None
        self._stages: Stages | None = None
        # Modules that parallelize_fn has placed; a second fit must not place them again.
        self._placed = WeakIdKeyDictionary()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._replaced = Replaced()

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def launcher(self) -> str:
        """``"local"``."""
        return "local"

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
            raise self._rank.too_early("device_mesh")
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
        self._rank.take(topology)
        self._mesh = self._sizes.make(topology.device, len(topology.devices), topology.num_nodes)
        if _has_stages(self._mesh):
            self._of_stage = TorchCollectives(topology.device, stage_group(self._mesh))
            self._stages = Stages(self._mesh, self.collectives, self._of_stage, topology.device)
        self._rank.meet()

    def teardown(self) -> None:
        """Leave the process group if this strategy has made it. May be called twice."""
        self._rank.leave()
        self._mesh = self._of_stage = self._stages = None
        self._placed.clear()
        self._replaced.forget()

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
        if self._parallelize is None and not has_placed_itself and not overrides_configure_model(module):
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
            self._share(module)  # each rank is about to keep a part of its own
            placed = self._parallelized(module, self._parallelize)
        if is_on_meta(placed):
            materialise(placed, self.root_device, self._own_stage)
        placed.to(self.root_device)
        self._share(placed)
        self._replaced.note(before, placed)
        if self._parallelize is not None:
            self._placed[module] = weakref.ref(placed)
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

    def _share(self, module: nn.Module) -> None:
        share_values(module, self.device_mesh, self.root_device)

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
            self._replaced.hand_over(optimizer)
            self._optimizers.add(optimizer)
        refuse_unreduced(module, optimizers, self.device_mesh)
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
        """Clip to the norm that one process would find, whatever meshes the gradients lie on.

        Source: Pascanu et al. 2013, algorithm 1.
        """
        clip = clip_by_norm if self._stages is None else self._stages.clip_by_norm
        return clip(parameters_of(optimizer), max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite)

    def clip_grad_value(self, module: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        """Clamp every gradient element to ``[-clip_value, clip_value]`` in place."""
        clip_by_value(parameters_of(optimizer), clip_value)

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["full", "sharded"]:
        """As ``save_distributed_checkpoint`` says; of a pipeline, whose ranks hold different modules, ``"full"``."""
        return "sharded" if self._saves_shards and not self._sizes.has_stages else "full"

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name. ``full``: whole CPU tensors on rank 0, empty elsewhere; otherwise DTensors."""
        states.reshard(module)
        state = states.module_state(module, full=full, rank=self._own_stage.rank)
        named = {states.canonical(name): value for name, value in state.items()}
        return named if self._stages is None or not full else self._stages.join_states(named)

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> object:
        """Load what ``module_state`` gave, of either kind, saved by any strategy on any number of ranks."""
        states.reshard(module)
        here = {states.canonical(name): name for name in module.state_dict()}
        named = {states.canonical(name): value for name, value in state.items()}
        if self._stages is not None:
            named = self._stages.own_part(named, set(here))
        named = {here.get(name, name): value for name, value in named.items()}
        return states.load_module_state(module, named, self._own_stage, strict=strict)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """Optimizer state in torch's layout; ``full`` as in ``module_state``."""
        state = states.optimizer_state(optimizer, full=full, rank=self._own_stage.rank)
        return state if self._stages is None or not full else self._stages.join_optimizers(state)

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load what ``optimizer_state`` gave, of either kind, saved by any strategy on any number of ranks."""
        if self._stages is not None:
            state = self._stages.own_optimizer(state, [len(group["params"]) for group in optimizer.param_groups])
        states.load_optimizer_state(optimizer, state, self._own_stage)

    def has_open_gradients(self, module: nn.Module) -> bool:
        """Whether this rank holds any gradient, reduced or not."""
        return has_open_gradients(module, module)

    def open_gradients(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """The state of every rank's gradients; ``full`` as in ``module_state``."""
        return open_gradients(module, module, self.collectives, full=full, stages=self._stages)

    def load_open_gradients(self, module: nn.Module, state: Mapping[str, object]) -> None:
        """Load what ``open_gradients`` gave.

        Raises:
            CheckpointError: ranks have gradients of their own in it, and there are other ranks now.
        """
        load_open_gradients(module, module, self.collectives, state)
        if self._stages is not None:
            keep_gradients(module, self._optimizers)


def _has_stages(mesh: DeviceMesh) -> bool:
    return "pipeline_parallel" in dimensions(mesh)


def _refuse_fsdp1(module: nn.Module) -> None:
    name = wrapped_by_first_fsdp(module)
    if name is not None:
        raise MisconfigurationTypeError(
            f"ModelParallelStrategy was given {type(module).__name__}, whose {name or 'root'!r} is wrapped in "
            "torch.distributed.fsdp.FullyShardedDataParallel (FSDP1): use torch.distributed.fsdp.fully_shard instead."
        )


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
