"""XLAStrategy: one process for each XLA device, gradients averaged over all of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from fulmen_protocols.errors import MisconfigurationException
from fulmen_xla import _limits
from fulmen_xla._arguments import parts_of
from fulmen_xla._library import library, platform, require
from fulmen_xla._place import DevicePlace, Replicas
from fulmen_xla._placing import created_on_host, step
from fulmen_xla.checkpoint_io import XLACheckpointIO
from fulmen_xla.environment import XLAEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.precision import Precision, PrecisionPlan
    from fulmen_protocols.strategy import StrategyParts
    from fulmen_protocols.topology import Topology
    from fulmen_xla.collectives import XLACollectives

__all__ = ["XLAStrategy", "check_replicas", "debug"]


class XLAStrategy:
    """Data parallelism in torch-xla's own way: a process for each chip, which PJRT starts and connects.

    Each parameter's gradient is averaged over the replicas as soon as the backward pass has it, in the recorded graph,
    so that hooks and clipping see the mean, and accumulation can hold it back.

    Args:
        accelerator: as the Trainer's argument.
        parallel_devices: this host's devices.
        checkpoint_io: writes checkpoints; None: ``XLACheckpointIO``.
        precision: an ``XLAPrecision``; ``precision_plugin`` is its other name.
        precision_plugin: see there.
        debug: let torch-xla report what it compiles, and why (PT_XLA_DEBUG).
        sync_module_states: give every replica the parameters and buffers of the first.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
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
        debug: bool = False,
        sync_module_states: bool = True,
    ) -> None:
        require("XLAStrategy")
        self._parts = parts_of("XLAStrategy", accelerator, parallel_devices, checkpoint_io, precision, precision_plugin)
        self.debug = debug
        self._sync_module_states = sync_module_states
        self._place = DevicePlace("XLAStrategy", reports=debug)
        self._replicas = Replicas("XLAStrategy", "xla", self._place)
        self._holds_back = False

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
        return _limits.own_precision("xla", name)

    def own_checkpoint_io(self) -> CheckpointIO:
        """``XLACheckpointIO``."""
        return XLACheckpointIO()

    def check_precision(self, plan: PrecisionPlan) -> None:
        """Refuse a precision that scales losses, or is none of XLA's."""
        _limits.check_plan("xla", plan)

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Refuse devices of another kind, and runtimes whose replicas are threads of one process."""
        _limits.check_devices("xla", devices)
        check_replicas("xla", len(devices))

    @property
    def root_device(self) -> torch.device:
        """The device of this replica.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet; the processes may not have started.
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
        """Create modules on the host, from where ``place`` takes them; with ``empty`` without initialising them."""
        return created_on_host(empty=empty)

    def place(self, module: nn.Module) -> nn.Module:
        """Move ``module`` in place, give it the first replica's weights, and reduce its gradients from now on."""
        module = self.place_for_inference(module)
        if self.collectives.world_size > 1:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    cast("Any", parameter).register_post_accumulate_grad_hook(self._reduce)
        return module

    def place_for_inference(self, module: nn.Module) -> nn.Module:
        """Move ``module`` in place and give it the first replica's weights."""
        module = self._place.move(module)
        if self.collectives.world_size > 1 and self._sync_module_states:
            library("core.xla_model").broadcast_master_param(module)
        return module

    def _reduce(self, parameter: Tensor) -> None:
        if self._holds_back or parameter.grad is None:
            return
        xm: Any = library("core.xla_model")
        # A list is reduced in place.
        xm.all_reduce(xm.REDUCE_SUM, [parameter.grad], scale=1.0 / self.collectives.world_size)

    @contextmanager
    def no_sync(self, module: nn.Module) -> Generator[None]:
        """Within the block gradients stay local to this replica."""
        before, self._holds_back = self._holds_back, True
        try:
            yield
        finally:
            self._holds_back = before

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``; those made before ``place`` now hold the parameters on the device."""
        return self._place.follow(optimizers)

    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        """Step, and run what was recorded."""
        return step(optimizer, closure)

    def process_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """Upload batches while the device computes."""
        return self._place.uploading(loader)

    def teardown(self) -> None:
        """Let go of the device."""
        self._replicas.part()


def check_replicas(strategy: str, count: int) -> None:
    """Refuse several replicas where they would be threads of one process.

    Raises:
        MisconfigurationException: they would.
    """
    kind = platform()
    if count > 1 and kind == "CPU":
        raise MisconfigurationException(
            f"strategy {strategy!r} with {count} devices of PJRT's CPU runtime: its replicas are threads of one "
            "process, and their collectives wait for each other for ever. Use strategy='xla_spmd', or devices=1."
        )
    if count > 1 and kind == "TPU":
        version = library("_internal.tpu").version()
        if version in (2, 3):
            raise MisconfigurationException(
                f"strategy {strategy!r} on TPU v{version}, where two replicas are threads of one process, and would "
                "share a Trainer. Use strategy='xla_spmd', or a TPU v4 or later."
            )


def debug() -> XLAStrategy:
    """``XLAStrategy`` with torch-xla's reports on; what ``strategy="xla_debug"`` makes."""
    return XLAStrategy(debug=True)
