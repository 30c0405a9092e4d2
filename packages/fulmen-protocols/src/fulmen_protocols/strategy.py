"""Strategy: how one model is spread over the processes of one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.cluster_environment import ClusterEnvironment
    from fulmen_protocols.collectives import Collectives
    from fulmen_protocols.precision import Precision, PrecisionPlan
    from fulmen_protocols.topology import Topology

__all__ = [
    "BringsParts",
    "CarriesParts",
    "LimitsInferenceMode",
    "OwnsAccumulation",
    "OwnsBackward",
    "OwnsOptimizerStep",
    "Strategy",
    "StrategyParts",
    "SupportsAdvice",
    "SupportsBoundMethods",
    "SupportsCollectives",
    "SupportsDataParallel",
    "SupportsDeviceMesh",
    "SupportsDevices",
    "SupportsGradClipping",
    "SupportsInferencePlacement",
    "SupportsLaunch",
    "SupportsLoaderProcessing",
    "SupportsManualBackward",
    "SupportsMemoryPlan",
    "SupportsModuleCheck",
    "SupportsNoSync",
    "SupportsOpenGradients",
    "SupportsPrecisionCheck",
    "SupportsPrecisionPlan",
    "SupportsReplicaCheck",
    "SupportsShardedState",
    "SupportsStateKindChoice",
    "SupportsWorldCheck",
]


@runtime_checkable
class Strategy(Protocol):
    """Places a module on the devices of a run. Knows nothing about epochs, precision, logging or files.

    Life, in order: ``setup_environment`` once per process, ``module_context`` while modules are created, ``place`` each
    module, ``prepare_optimizers`` with optimizers made from the placed module's parameters, then any number of steps,
    and ``teardown``. After ``teardown`` the cycle may start again.
    """

    @property
    def root_device(self) -> torch.device:
        """The device of this process; valid after ``setup_environment``."""
        ...

    def setup_environment(self, topology: Topology) -> None:
        """Learn this process's place and join the process group, if there is one."""
        ...

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Within the block, new modules are created where this strategy wants them.

        With ``empty`` their values need not be initialised (a checkpoint will be loaded), and a sharding strategy
        creates them on the meta device.
        """
        ...

    def place(self, module: nn.Module) -> nn.Module:
        """Return ``module`` on this process's device, wrapped or sharded as training needs it.

        ``module`` itself stays usable and keeps sharing its parameters with what is returned, so that its
        ``state_dict`` has the canonical names.
        """
        ...

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return the optimizers to step, in the same order; usually the ones given. ``module`` is the placed one."""
        ...

    def teardown(self) -> None:
        """Leave the process group and release the device. Calling it twice is allowed."""
        ...


class StrategyParts(NamedTuple):
    """Parts of a run that its user has given to the strategy; None where nothing was given."""

    accelerator: Accelerator | None = None
    parallel_devices: Sequence[torch.device] | None = None
    """This node's devices, one per process."""
    cluster_environment: ClusterEnvironment | None = None
    checkpoint_io: CheckpointIO | None = None
    precision: Precision | None = None


@runtime_checkable
class CarriesParts(Protocol):
    """A strategy that may have been made with other parts of the run, which are then used.

    A part that the user has also given elsewhere is a conflict, reported when the run is assembled.
    """

    @property
    def parts(self) -> StrategyParts:
        """What the user gave."""
        ...


@runtime_checkable
class BringsParts(Protocol):
    """A strategy that brings parts of its own kind, for what the user has given nowhere."""

    def own_environment(self) -> ClusterEnvironment | None:
        """What tells its processes their ranks; None: whatever is detected."""
        ...

    def own_precision(self, name: str) -> Precision | None:
        """The precision of that canonical name; None: the one that is registered under it.

        Raises:
            ValueError: this strategy cannot train in it; the message names those that it can.
        """
        ...

    def own_checkpoint_io(self) -> CheckpointIO | None:
        """What writes its checkpoints, of the kind that ``state_kind`` says; None: the one for that kind."""
        ...


@runtime_checkable
class SupportsLaunch(Protocol):
    """A strategy that runs in several processes."""

    @property
    def launcher(self) -> str:
        """Name of the launcher that starts the processes when the environment has not, for example ``"local"``."""
        ...


@runtime_checkable
class SupportsCollectives(Protocol):
    """A strategy of several processes; without it the run must have one."""

    @property
    def collectives(self) -> Collectives:
        """Communication among this run's ranks; valid after ``setup_environment``."""
        ...


@runtime_checkable
class SupportsInferencePlacement(Protocol):
    """A strategy that places a module differently when no gradient will be taken (DDP: no wrapper, equal weights)."""

    def place_for_inference(self, module: nn.Module) -> nn.Module:
        """Return ``module`` on this process's device with the weights of rank 0, ready for evaluation."""
        ...


@runtime_checkable
class LimitsInferenceMode(Protocol):
    """A strategy whose devices may not know ``torch.inference_mode``; an evaluation then takes ``torch.no_grad``."""

    @property
    def allows_inference_mode(self) -> bool:
        """Whether they know it."""
        ...


@runtime_checkable
class SupportsBoundMethods(Protocol):
    """A strategy whose wrapper must be entered through its ``forward`` for its hooks to fire (DDP, FSDP)."""

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """A callable that runs the original module's method ``name`` through the wrapper that ``place`` returned."""
        ...


@runtime_checkable
class SupportsManualBackward(Protocol):
    """A strategy with bound methods whose wrapper must be told of backward passes that run inside such a method."""

    def bind_manual_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """As ``bind_method``, for a method that itself runs any number of backward passes (manual optimization)."""
        ...

    def manual_backward(self, placed: nn.Module, loss: Tensor) -> AbstractContextManager[object]:
        """Surrounds each ``loss.backward()`` in there: within the block its gradients are averaged over ranks.

        Inside ``no_sync`` it does nothing, and the gradients stay local.
        """
        ...


@runtime_checkable
class SupportsMemoryPlan(Protocol):
    """A strategy whose ``place`` reads values, or depends on the device.

    A plan of memory has neither: its tensors have shapes only, on the CPU. It calls ``place`` of other strategies.
    """

    def place_for_plan(self, module: nn.Module, device: torch.device) -> tuple[nn.Module, Mapping[str, int]]:
        """Return ``module`` with parameters as ``place`` leaves them, and what else ``place`` would allocate.

        That is bytes on this rank by purpose, beyond parameters and their gradients. The module stays on the CPU;
        ``device`` is the kind of device that the plan is for.
        """
        ...


@runtime_checkable
class SupportsNoSync(Protocol):
    """A strategy whose gradient reduction can be held back while accumulating."""

    def no_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Within the block, ``backward`` leaves gradients local to this rank. ``module`` is the placed one."""
        ...


@runtime_checkable
class OwnsBackward(Protocol):
    """A strategy whose engine runs the backward pass; without it ``loss.backward()`` is called."""

    def backward(self, loss: Tensor, module: nn.Module | None, **kwargs: object) -> None:
        """Accumulate d(loss)/d(parameter). ``module`` is the placed one, None where there is only one."""
        ...


@runtime_checkable
class OwnsOptimizerStep(Protocol):
    """A strategy whose engine steps the optimizer; without it ``optimizer.step()`` is called."""

    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        """Step once and return what the engine's step returns. ``module`` is the placed one."""
        ...


@runtime_checkable
class OwnsAccumulation(Protocol):
    """A strategy whose engine counts accumulation itself: every batch calls its step, and it decides."""

    def set_accumulation(self, batches: int) -> None:
        """Number of batches per optimizer step, at least 1. Called before ``place``."""
        ...


@runtime_checkable
class SupportsGradClipping(Protocol):
    """A strategy that must clip by itself because one rank does not hold whole gradients."""

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
        ...

    def clip_grad_value(self, module: nn.Module, optimizer: Optimizer, clip_value: float) -> None:
        """Clamp every gradient element to ``[-clip_value, clip_value]`` in place."""
        ...


@runtime_checkable
class SupportsPrecisionCheck(Protocol):
    """A strategy that leaves the precision to the run, and cannot work with every one."""

    def check_precision(self, plan: PrecisionPlan) -> None:
        """Refuse ``plan`` before anything is started.

        Raises:
            ValueError: training would go wrong; the message names what cannot work, and what does.
        """
        ...


@runtime_checkable
class SupportsPrecisionPlan(Protocol):
    """A strategy that applies a precision itself (FSDP2's mixed precision policy, an engine's own casting).

    The run then leaves modules, inputs and outputs as they are and enters no context around forward; only losses are
    still scaled where the plan wants that.
    """

    def apply_precision_plan(self, plan: PrecisionPlan) -> None:
        """Take over parameter, compute, reduction and output dtypes. Called before ``place``.

        Raises:
            ValueError: this strategy cannot honour ``plan``; the message names both.
        """
        ...


@runtime_checkable
class SupportsDataParallel(Protocol):
    """A strategy in which not every rank reads its own part of the data (tensor parallel ranks share theirs)."""

    @property
    def data_parallel_rank(self) -> int:
        """Index of this rank's part of the data."""
        ...

    @property
    def data_parallel_size(self) -> int:
        """Number of parts into which the data is split."""
        ...


@runtime_checkable
class SupportsDeviceMesh(Protocol):
    """A strategy that arranges its processes along named dimensions, for users to place their modules by."""

    @property
    def device_mesh(self) -> DeviceMesh:
        """All processes of the run; valid after ``setup_environment``.

        Where the strategy also offers ``SupportsDataParallel``, the ranks among which the data are split are those of
        the dimension ``"data_parallel"``.
        """
        ...


@runtime_checkable
class SupportsWorldCheck(Protocol):
    """A strategy that cannot run in every number of processes, or on every device."""

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Refuse a run of one process for each of ``devices`` on each of ``num_nodes`` nodes, before any is started.

        Raises:
            ValueError: the strategy cannot run there; the message names its options and what was found.
        """
        ...


@runtime_checkable
class SupportsModuleCheck(Protocol):
    """A strategy that cannot place every module."""

    def check_module(self, module: nn.Module) -> None:
        """Refuse ``module``, which may not be built yet, before anything is started.

        Raises:
            ValueError: ``place`` would fail; the message says what the module needs.
        """
        ...


@runtime_checkable
class SupportsLoaderProcessing(Protocol):
    """A strategy that feeds its device through a loader of its own (XLA)."""

    def process_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """Return an iterable over the same batches, already on the device."""
        ...


@runtime_checkable
class SupportsReplicaCheck(Protocol):
    """A strategy whose ranks should hold equal parameters and can tell whether they do."""

    def drifted_parameters(self, module: nn.Module) -> list[str]:
        """Canonical names of the parameters that differ between ranks, the same list on every rank. A collective."""
        ...


@runtime_checkable
class SupportsAdvice(Protocol):
    """A strategy that learns something about its settings while it trains."""

    def advice(self, placed: nn.Module) -> str | None:
        """What to change in the next run; None if nothing. Asked once, when training with ``placed`` is over."""
        ...


@runtime_checkable
class SupportsDevices(Protocol):
    """A strategy that drives several devices of a machine from one process, without ranks (``DataParallel``)."""

    def take_devices(self, devices: Sequence[torch.device]) -> None:
        """Learn which; called once, before ``setup_environment``, whose topology then has the first of them alone."""
        ...


@runtime_checkable
class SupportsShardedState(Protocol):
    """A strategy whose module or optimizer state is not whole on one rank. Every method is called by every rank."""

    @property
    def state_kind(self) -> Literal["full", "sharded"]:
        """Which of the two a checkpoint of this run holds."""
        ...

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name. ``full``: whole CPU tensors on rank 0, empty elsewhere; otherwise local shards."""
        ...

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> None:
        """Load what ``module_state`` gave, of either kind."""
        ...

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """Optimizer state in torch's ``state_dict`` layout; ``full`` as in ``module_state``."""
        ...

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load what ``optimizer_state`` gave, of either kind."""
        ...


@runtime_checkable
class SupportsOpenGradients(Protocol):
    """A strategy with ``SupportsShardedState`` that can save the gradients of a window of accumulation.

    The state that it gives is plain data and tensors. Under ``"added"`` stand, by canonical name, gradients that are
    parts of one whole; any strategy can take these. ``"own"`` is None, or what each rank has for itself.
    """

    def has_open_gradients(self, module: nn.Module) -> bool:
        """Whether this rank holds any gradient, reduced or not."""
        ...

    def open_gradients(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """The state of every rank's gradients; ``full`` as in ``module_state``. Every rank must call it."""
        ...

    def load_open_gradients(self, module: nn.Module, state: Mapping[str, object]) -> None:
        """Load what ``open_gradients`` gave, whole and on every rank.

        Raises:
            CheckpointError: ranks have gradients of their own in it, and there are other ranks now.
        """
        ...


@runtime_checkable
class SupportsStateKindChoice(Protocol):
    """A strategy with ``SupportsShardedState`` that saves either kind: the run chooses where the user has not."""

    def default_state_kind(self, kind: Literal["full", "sharded"]) -> None:
        """Let ``state_kind`` be ``kind`` unless the user has said otherwise. Called when a run is assembled."""
        ...
