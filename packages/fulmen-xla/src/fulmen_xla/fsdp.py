"""XLAFSDPStrategy: one process for each device, each with a shard of every parameter (torch-xla's FSDP)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError
from fulmen_xla import _limits, _shards
from fulmen_xla._arguments import parts_of, wrap_policy
from fulmen_xla._entry import Entry, enter
from fulmen_xla._library import library, require
from fulmen_xla._place import DevicePlace, Replicas
from fulmen_xla._placing import created_on_host, quiet_hooks, step
from fulmen_xla.checkpoint_io import XLACheckpointIO
from fulmen_xla.environment import XLAEnvironment
from fulmen_xla.parallel import check_replicas
from fulmen_xla.shard_files import XLAShardFilesIO

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.precision import Precision, PrecisionPlan
    from fulmen_protocols.strategy import StrategyParts
    from fulmen_protocols.topology import Topology
    from fulmen_xla.collectives import XLACollectives

__all__ = ["XLAFSDPStrategy"]


class XLAFSDPStrategy:
    """Fully sharded data parallelism by ``torch_xla.distributed.fsdp.XlaFullyShardedDataParallel``.

    Optimizers must be made from the placed module, whose parameters are shards. For one machine ``xla_spmd`` does the
    same with less: the compiler spreads the work, and nothing is wrapped by hand.

    Args:
        accelerator: as the Trainer's argument.
        parallel_devices: this host's devices.
        checkpoint_io: writes checkpoints; None: a file for each rank, or ``XLACheckpointIO`` for whole ones.
        precision: an ``XLAPrecision``; parameters stay float32, and layers compute in its dtype.
        precision_plugin: its other name.
        auto_wrap_policy: classes of layers that are gathered one by one, or torch-xla's policy function.
        activation_checkpointing_policy: classes of layers whose activations are computed again in the backward pass;
            they are wrapped one by one, too.
        state_dict_type: ``"sharded"``: a folder with a file of each rank. ``"full"``: one file, for which rank 0
            gathers everything; on one host only.
        sequential_save: ranks of a host write one after the other, which takes less memory and longer.
        kwargs: those of torch-xla's class; ``flatten_parameters`` is refused, since names would be lost.

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
        parallel_devices: Sequence[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        auto_wrap_policy: Collection[type[nn.Module]] | Callable[..., bool] | None = None,
        activation_checkpointing_policy: Collection[type[nn.Module]] | None = None,
        state_dict_type: Literal["full", "sharded"] = "sharded",
        sequential_save: bool = False,
        **kwargs: Any,
    ) -> None:
        if state_dict_type not in ("full", "sharded"):
            raise MisconfigurationException(
                f"XLAFSDPStrategy(state_dict_type={state_dict_type!r}): use 'full' (one file) or 'sharded' (a folder)."
            )
        if kwargs.get("flatten_parameters"):
            raise MisconfigurationException(
                "XLAFSDPStrategy(flatten_parameters=True) would leave no parameter with a name of its own, by which "
                "checkpoints are loaded. Leave it out, and wrap layers with auto_wrap_policy."
            )
        if activation_checkpointing_policy and "auto_wrapper_callable" in kwargs:
            raise MisconfigurationException(
                "XLAFSDPStrategy got activation_checkpointing_policy= and auto_wrapper_callable=, which both say how a "
                "layer is wrapped. Give one of the two."
            )
        require("XLAFSDPStrategy")
        self._parts = parts_of(
            "XLAFSDPStrategy", accelerator, parallel_devices, checkpoint_io, precision, precision_plugin
        )
        self._policy = wrap_policy("XLAFSDPStrategy", auto_wrap_policy or activation_checkpointing_policy)
        self._recomputed = tuple(activation_checkpointing_policy or ())
        if not all(isinstance(cast("object", one), type) for one in self._recomputed):
            raise MisconfigurationTypeError(
                f"XLAFSDPStrategy(activation_checkpointing_policy={activation_checkpointing_policy!r}) is not a set of "
                "layer classes, such as {nn.Linear}."
            )
        self._kind: Literal["full", "sharded"] = state_dict_type
        self._sequential = sequential_save
        self._kwargs = kwargs
        self._compute = torch.float32
        self._place = DevicePlace("XLAFSDPStrategy")
        self._replicas = Replicas("XLAFSDPStrategy", "xla_fsdp", self._place)
        self._layouts: dict[int, _shards.Layout] = {}

    @property
    def parts(self) -> StrategyParts:
        """What the user gave."""
        return self._parts

    @property
    def launcher(self) -> str:
        """``"xla"``."""
        return "xla"

    def own_environment(self) -> XLAEnvironment:
        """``XLAEnvironment``."""
        return XLAEnvironment()

    def own_precision(self, name: str) -> Precision:
        """``XLAPrecision`` of that name."""
        return _limits.own_precision("xla_fsdp", name)

    def own_checkpoint_io(self) -> CheckpointIO:
        """A file for each rank, or ``XLACheckpointIO`` for whole checkpoints."""
        return XLACheckpointIO() if self._kind == "full" else XLAShardFilesIO(sequential=self._sequential)

    def apply_precision_plan(self, plan: PrecisionPlan) -> None:
        """Compute in the plan's dtype; parameters stay float32, as torch-xla's FSDP wants them.

        Raises:
            MisconfigurationException: the plan scales losses, or computes in float64.
        """
        _limits.check_plan("xla_fsdp", plan)
        self._compute = plan["compute"]

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Refuse devices of another kind, whole checkpoints from several hosts, and replicas that are threads."""
        _limits.check_devices("xla_fsdp", devices)
        check_replicas("xla_fsdp", len(devices))
        if self._kind == "full" and num_nodes > 1:
            raise MisconfigurationException(
                f"XLAFSDPStrategy(state_dict_type='full') with num_nodes={num_nodes}: hosts of a TPU share no file "
                "system and rank 0 would gather everything over the network. Use state_dict_type='sharded'."
            )

    def check_module(self, module: nn.Module) -> None:
        """Refuse a module that belongs to a Trainer: its ``configure_optimizers`` would find no parameter.

        Raises:
            MisconfigurationException: it does.
        """
        if getattr(module, "_trainer", None) is not None:
            raise MisconfigurationException(
                f"strategy 'xla_fsdp' with a Trainer: torch-xla's FSDP leaves {type(module).__name__} itself without "
                "parameters, from which it could make its optimizers. Use strategy='xla_spmd', or a Fabric."
            )

    @property
    def root_device(self) -> torch.device:
        """The device of this replica.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._place.device

    @property
    def collectives(self) -> XLACollectives:
        """Communication among the replicas.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._replicas.collectives

    def setup_environment(self, topology: Topology) -> None:
        """Open this replica's device and see that the runtime counts as the run does.

        Raises:
            MisconfigurationException: it does not, or this process already drives its devices as one.
        """
        self._replicas.meet(topology)

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Create modules on the host, from where ``place`` shards them; with ``empty`` without initialising them."""
        return created_on_host(empty=empty)

    def place(self, module: nn.Module) -> nn.Module:
        """Shard ``module``'s parameters and wrap it. All replicas get the first one's weights.

        Raises:
            MisconfigurationException: a parameter is not float32, or the module is a Trainer's.
        """
        self.check_module(module)
        strange = [name for name, one in module.named_parameters() if one.dtype is not torch.float32]
        if strange:
            raise MisconfigurationException(
                f"strategy 'xla_fsdp' shards float32 parameters, and {strange[0]} of {type(module).__name__} is none. "
                "Make the model in float32 and choose what it computes in by precision='bf16-true'."
            )
        quiet_hooks()
        layout = _shards.Layout(module)
        if self.collectives.world_size > 1:
            module.to(self.root_device)
            library("core.xla_model").broadcast_master_param(module)
        wrapper = library("distributed.fsdp").XlaFullyShardedDataParallel
        options = dict(self._kwargs)
        options.setdefault("compute_dtype", self._compute)
        if self._policy is not None:
            options.setdefault("auto_wrap_policy", self._policy())
        if self._recomputed:
            options["auto_wrapper_callable"] = partial(_recomputing, wrapper, self._recomputed)
        placed = cast("nn.Module", wrapper(Entry(module), **options))
        layout.find_shards(placed)
        self._layouts[id(placed)] = layout
        return placed

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """The original module's method ``name``, run inside the wrapper's forward."""
        return enter(placed, name)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Within the block gradients stay local to this replica, and whole."""
        return cast("AbstractContextManager[object]", cast("Any", module).no_sync())

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``.

        Raises:
            MisconfigurationException: one was made from parameters that are no shards.
        """
        for optimizer in optimizers:
            held: list[Any] = [one for group in optimizer.param_groups for one in group["params"]]
            if not all(getattr(one, "_is_sharded", False) for one in held):
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} holds parameters that strategy 'xla_fsdp' has replaced by shards. "
                    "Place the module first and make the optimizer from that: model = fabric.setup(model); optimizer = "
                    "fabric.setup_optimizers(Optimizer(model.parameters()))."
                )
        return optimizers

    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        """Step, and run what was recorded; gradients were reduced in the backward pass."""
        return step(optimizer, closure)

    def clip_grad_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        *,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Clip to the norm over all shards, and return it as it was, shape ``()``.

        Raises:
            RuntimeError: it is not finite, and ``error_if_nonfinite``.
        """
        norm = cast("Tensor", cast("Any", module).clip_grad_norm_(max_norm, norm_type)).reshape(())
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise RuntimeError(f"the norm of the gradients is {norm.item()}, which cannot be clipped to {max_norm}.")
        return norm

    def clip_grad_value(self, module: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        """Clamp every element of the gradients' shards.

        Raises:
            MisconfigurationException: always, as in Lightning; torch-xla's FSDP clips by norm.
        """
        raise MisconfigurationException(
            f"gradient_clip_val={clip_value!r} with gradient_clip_algorithm='value' under strategy 'xla_fsdp', which "
            "clips by norm only. Use gradient_clip_algorithm='norm'."
        )

    def process_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """Upload batches while the device computes."""
        return self._place.uploading(loader)

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["full", "sharded"]:
        """Whether a checkpoint is one file or a folder."""
        return self._kind

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name: whole CPU tensors on rank 0, or this rank's shards."""
        return self._layout(module).module_state(self.collectives, full=full)

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> _shards.Outcome:
        """Load either kind; a whole state counts on rank 0 where the others have none.

        Raises:
            RuntimeError: shapes do not fit; with ``strict`` also where a name is missing or unknown.
        """
        return self._layout(module).load_module_state(state, self.collectives, strict=strict)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """Optimizer state in torch's layout: whole CPU tensors on rank 0, or this rank's shards."""
        return self._layout(module).optimizer_state(optimizer, self.collectives, full=full)

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load either kind."""
        self._layout(module).load_optimizer_state(optimizer, state, self.collectives)

    def _layout(self, module: nn.Module) -> _shards.Layout:
        return self._layouts[id(module)]

    def teardown(self) -> None:
        """Let go of the device."""
        self._replicas.part()
        self._layouts.clear()


def _recomputing(wrapper: Any, kinds: tuple[type[nn.Module], ...], module: nn.Module, **options: Any) -> nn.Module:
    """Wrap one layer, which forgets its activations if it is of one of these ``kinds``."""
    if isinstance(module, kinds):
        module = library("distributed.fsdp").checkpoint_module(module)
    return cast("nn.Module", wrapper(module, **options))
