"""DeepSpeedStrategy: training by DeepSpeed's engine, with ZeRO's stages, offloading and sharded checkpoints."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from fulmen_deepspeed import _optimizers, _states, _verify
from fulmen_deepspeed._checkpoint import EngineCheckpoints
from fulmen_deepspeed._engines import Engines
from fulmen_deepspeed._library import deepspeed_for, require_deepspeed
from fulmen_deepspeed._module_init import created_on
from fulmen_deepspeed._process_group import ProcessGroup
from fulmen_deepspeed._settings import settings_from
from fulmen_protocols import StrategyParts
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fulmen_deepspeed import config as config_module
    from fulmen_deepspeed.collectives import EngineCollectives
    from fulmen_protocols import Accelerator, ClusterEnvironment, Precision, PrecisionPlan, Topology

__all__ = ["DeepSpeedStrategy"]

_DEFAULT_TIMEOUT = timedelta(minutes=30)


class DeepSpeedStrategy:
    """Data parallel training by DeepSpeed's engine. It runs backward, accumulates, clips and steps by itself.

    Names and defaults are those of Lightning's strategy. With ``config`` the arguments from ``zero_optimization`` to
    ``zero_allow_untested_optimizer`` are not used, and may not be given.

    Args:
        accelerator: the accelerator, instead of giving it to the run.
        zero_optimization: False: no ZeRO, whatever ``stage`` says.
        stage: what is spread over the ranks: 1 optimizer state, 2 gradients too, 3 parameters too; 0 nothing.
        remote_device: where stage 3 keeps parameters as modules are made: ``"cpu"``, ``"nvme"``; None: on the device.
        offload_optimizer: keep optimizer state in host memory or on NVMe, and step there.
        offload_parameters: with stage 3, keep parameters there.
        offload_params_device: ``"cpu"`` or ``"nvme"``.
        nvme_path: folder on an NVMe drive.
        params_buffer_count: buffers for parameters on NVMe.
        params_buffer_size: elements of such a buffer.
        max_in_cpu: elements of parameters to keep in host memory all the same.
        offload_optimizer_device: ``"cpu"`` or ``"nvme"``.
        optimizer_buffer_count: buffers for optimizer state on NVMe; at least the number of states of a parameter.
        block_size: bytes of a block of asynchronous I/O.
        queue_depth: requests that are under way at a time.
        single_submit: submit requests one by one.
        overlap_events: do not wait for one request before the next.
        thread_count: threads of a request.
        pin_memory: offload to pinned memory.
        sub_group_size: elements that stage 3 steps at a time.
        contiguous_gradients: copy gradients into one buffer as they come.
        overlap_comm: reduce gradients while backward goes on.
        allgather_partitions: gather updated parameters by all-gather instead of broadcasts.
        reduce_scatter: reduce gradients by reduce-scatter instead of all-reduce.
        allgather_bucket_size: elements gathered at a time.
        reduce_bucket_size: elements reduced at a time.
        zero_allow_untested_optimizer: take optimizers that DeepSpeed has not been tested with.
        logging_batch_size_per_gpu: samples in a rank's batch, for DeepSpeed's log of its throughput (shown with
            ``logging_level=logging.INFO``); ``"auto"``: that of the training loader, where it can be told.
        config: DeepSpeed's own configuration, a dict or the path of a JSON file. None: the file that the environment
            variable ``PL_DEEPSPEED_CONFIG_PATH`` names, or what the arguments say. It is never changed.
        logging_level: of DeepSpeed's logger.
        parallel_devices: this node's devices, instead of ``devices`` of the run.
        cluster_environment: instead of giving it to the run.
        loss_scale: of float16 losses; 0: it adapts.
        initial_scale_power: it starts with two to this power.
        loss_scale_window: steps without overflow after which it is doubled.
        hysteresis: overflows that are let pass before it is halved.
        min_loss_scale: its smallest value.
        partition_activations: spread checkpointed activations over model parallel ranks. Activations are checkpointed
            where the model calls ``deepspeed.checkpointing.checkpoint``.
        cpu_checkpointing: keep such activations in host memory.
        contiguous_memory_optimization: keep them in one buffer.
        synchronize_checkpoint_boundary: wait for the device at each of them.
        load_full_weights: ``ckpt_path`` may be one file with the weights of the whole model instead of a folder of
            DeepSpeed's; no optimizer state is loaded from it.
        precision_plugin: the precision, instead of giving it to the run.
        process_group_backend: ``"nccl"``, ``"gloo"``, ...; None: what suits the device.
        timeout: after which a rank gives up waiting for others in a collective; None: 30 minutes.
        exclude_frozen_parameters: leave parameters without gradients out of checkpoints.
        precision: the same as ``precision_plugin``.

    Raises:
        MissingPackage: DeepSpeed is not installed, or too old.
        MisconfigurationException: arguments that contradict each other or that DeepSpeed has no meaning for.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        zero_optimization: bool = True,
        stage: int = 2,
        remote_device: str | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme",
        params_buffer_count: int = 5,
        params_buffer_size: int = 100_000_000,
        max_in_cpu: int = 1_000_000_000,
        offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4,
        block_size: int = 1_048_576,
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
        thread_count: int = 1,
        pin_memory: bool = False,
        sub_group_size: int = 1_000_000_000_000,
        contiguous_gradients: bool = True,
        overlap_comm: bool = True,
        allgather_partitions: bool = True,
        reduce_scatter: bool = True,
        allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000,
        zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: str | int | None = "auto",
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        logging_level: int = logging.WARNING,
        parallel_devices: Sequence[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        loss_scale: float = 0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        partition_activations: bool = False,
        cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False,
        synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = _DEFAULT_TIMEOUT,
        exclude_frozen_parameters: bool = False,
        *,
        precision: Precision | None = None,
    ) -> None:
        given = dict(locals())  # first of all: every argument by name, and nothing else
        require_deepspeed()
        self._settings = settings_from(DeepSpeedStrategy, given)
        if precision is not None and precision_plugin is not None:
            raise MisconfigurationException(
                "DeepSpeedStrategy got precision and precision_plugin, which are the same. Give one of the two."
            )
        self._parts = StrategyParts(
            accelerator, parallel_devices, cluster_environment, None, precision_plugin or precision
        )
        self._logging_level = logging_level
        self._device_type = "cuda"  # until the devices are known
        self._group = ProcessGroup(process_group_backend, _DEFAULT_TIMEOUT if timeout is None else timeout)
        self._engines = Engines(self._settings, self._group, remote_device)
        self._checkpoints = EngineCheckpoints(
            self._group, exclude_frozen=exclude_frozen_parameters, load_full_weights=load_full_weights
        )

    # -- before anything starts ---------------------------------------------------------------------------------------

    @property
    def config(self) -> config_module.Config:
        """DeepSpeed's configuration as it stands, without what the run decides."""
        return self._settings.config

    @property
    def parts(self) -> StrategyParts:
        """The parts of the run that were given to this strategy."""
        return self._parts

    @property
    def launcher(self) -> str:
        """``"local"``."""
        return "local"

    @property
    def stage(self) -> int:
        """The ZeRO stage: what is spread over the ranks."""
        return self._settings.stage

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Compare the arguments with the devices of each node.

        Raises:
            MisconfigurationException: DeepSpeed cannot drive them, or finds them under other numbers.
            BackendUnavailable: offloading to NVMe was asked for, and this machine cannot.
        """
        _verify.devices(devices)
        _verify.nvme(self._settings.config)
        self._device_type = devices[0].type

    def apply_precision_plan(self, plan: PrecisionPlan) -> None:
        """Take over the dtype of computation.

        Raises:
            MisconfigurationException: the engine does not compute in it, here or at all, or the configuration says
                something else.
        """
        self._settings.apply_plan(plan, self._device_type)

    def set_accumulation(self, batches: int) -> None:
        """Let the engine step after so many batches.

        Raises:
            MisconfigurationException: the configuration has a number of its own.
        """
        self._settings.set_accumulation(batches)

    def set_clipping(self, value: float | None, algorithm: Literal["norm", "value"] = "norm") -> None:
        """Let the engine clip gradients to the norm ``value`` before each step; None leaves it to the configuration.

        Raises:
            MisconfigurationException: clipping by value, or the configuration has another norm.
        """
        self._settings.set_clipping(value, algorithm)

    @property
    def wants_batch_size(self) -> bool:
        """Whether the number of samples in a batch is still unknown."""
        return self._settings.wants_batch_size

    def set_batch_size(self, samples: int) -> None:
        """Learn the number of samples in a batch of one rank; DeepSpeed's log of its throughput counts with it."""
        self._settings.set_batch_size(samples)

    @property
    def makes_optimizers(self) -> bool:
        """Whether the configuration defines the optimizer."""
        return self._settings.makes_optimizer

    @property
    def state_kind(self) -> Literal["full", "sharded"]:
        """What a checkpoint that the engine does not write holds: the whole model."""
        return "full"

    # -- processes ----------------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """The device of this process.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._group.device

    @property
    def collectives(self) -> EngineCollectives:
        """Communication among this run's ranks.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._group.collectives

    def setup_environment(self, topology: Topology) -> None:
        """Join the process group, or take over the one that exists. Calling it again changes nothing.

        Raises:
            MisconfigurationException: an existing group has another rank or size.
            BackendUnavailable: torch lacks the backend, or DeepSpeed drives another kind of device.
        """
        self.check_world(topology.devices, topology.num_nodes)
        self._engines.use(deepspeed_for(topology.device.type, self._logging_level))
        self._group.join(topology)

    def teardown(self) -> None:
        """Take the engines apart and leave the process group if this strategy has made it. May be called twice."""
        self._engines.dismantle()
        self._group.leave()

    # -- modules ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def module_context(self, *, empty: bool) -> Generator[None]:
        """Create modules on the device, in stage 3 each parameter spread over the ranks as soon as it is made.

        With ``empty`` the initialisers of ``torch.nn`` do nothing.
        """
        with contextlib.ExitStack() as stack:
            if self.stage == 3:
                stack.enter_context(self._engines.spreading())
                if empty:
                    stack.enter_context(created_on(torch.get_default_device(), empty=True))
            else:
                stack.enter_context(created_on(self.root_device, empty=empty))
            yield

    def place(self, module: nn.Module) -> nn.Module:
        """Return the entry of ``module``, on the device in place and with the weights of rank 0.

        The training engine is made with the optimizer, by ``prepare_optimizers``. A module that an engine has trained
        keeps it until then, and is evaluated through it. Parameters are spread over ranks by the engine, which stage 3
        also makes for a module without an optimizer, when it is first called.
        """
        return self._engines.place(module)

    def place_for_plan(self, module: nn.Module, device: torch.device) -> tuple[nn.Module, Mapping[str, int]]:
        """Refuse: what the engine will allocate is not to be seen from outside.

        Raises:
            MisconfigurationException: always.
        """
        raise MisconfigurationException(
            "a memory plan cannot be made of strategy 'deepspeed', whose engine keeps buffers of its own. Ask "
            "DeepSpeed: estimate_zero2_model_states_mem_needs_all_live of deepspeed.runtime.zero.stage_1_and_2, or "
            "estimate_zero3_model_states_mem_needs_all_live of deepspeed.runtime.zero.stage3."
        )

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """The original module's method ``name``, run inside the engine's forward."""
        entry = self._engines.entry(placed)
        return entry if name == "forward" else partial(entry.run, getattr(entry.module, name))

    def bind_manual_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """As ``bind_method``, for a method that itself runs backward passes, each within ``manual_backward``."""
        entry = self._engines.entry(placed)
        return partial(entry.run_manual, getattr(entry.module, name))

    def manual_backward(self, placed: nn.Module, loss: Tensor) -> AbstractContextManager[None]:
        """Surrounds each backward pass inside a manually bound method."""
        return self._engines.entry(placed).manual_backward()

    # -- training -----------------------------------------------------------------------------------------------------

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Make the engine, and return the optimizer that it steps: the one given, or that of the configuration.

        Without either the module is ready for evaluation only.

        Raises:
            MisconfigurationException: several optimizers, one that DeepSpeed cannot step, or two definitions of one.
        """
        return self._engines.attach_for_training(module, optimizers)

    def backward(self, loss: Tensor, module: nn.Module | None, **kwargs: object) -> None:
        """Let the engine run the backward pass; it divides the loss by the number of accumulated batches.

        Raises:
            MisconfigurationException: an argument that the engine does not know, or no optimizer.
        """
        unknown = kwargs.keys() - {"retain_graph"}
        if unknown:
            raise MisconfigurationException(
                f"backward was given {', '.join(sorted(unknown))}, which DeepSpeed's engine does not take. Leave "
                f"{'it' if len(unknown) == 1 else 'them'} out; it knows retain_graph."
            )
        self._engines.training(module).backward(loss, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        """Run ``closure`` if there is one, then let the engine count the batch and step where a window ends."""
        if closure is not None:
            closure()
        return self._engines.training(module).step()

    def set_window_end(self, module: nn.Module | None, is_end: bool) -> None:
        """Say whether the next backward pass is the last one before an optimizer step."""
        self._engines.training(module).set_gradient_accumulation_boundary(is_end)

    def take_scheduler(self, module: nn.Module, scheduler: object) -> None:
        """Let the engine step ``scheduler`` after each of its optimizer steps."""
        self._engines.training(module).lr_scheduler = scheduler

    def release_schedulers(self, module: nn.Module) -> Sequence[object]:
        """The scheduler of the configuration, if it has one; the engine steps it no longer."""
        engine = self._engines.training(module)
        scheduler, engine.lr_scheduler = engine.lr_scheduler, None
        return [] if scheduler is None else [scheduler]

    # -- state --------------------------------------------------------------------------------------------------------

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name, in the plan's dtype of parameters; ``full``: whole CPU tensors on rank 0.

        While an engine trains, those are its float32 weights, from which it makes the ones it computes with.
        """
        return _states.module_state(self._engines.entry(module), full=full, rank=self.collectives.rank)

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> object:
        """Load what ``module_state`` gave, of either kind; returns what did not meet, as torch does."""
        return _states.load_module_state(self._engines.entry(module), state, self.collectives, strict=strict)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """State in torch's layout; ``full``: whole CPU tensors on rank 0, otherwise the part of this rank."""
        return _optimizers.state(self._engines.entry(module), optimizer, full=full, rank=self.collectives.rank)

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load what ``optimizer_state`` gave, of either kind."""
        _optimizers.load_state(self._engines.entry(module), optimizer, state, self.collectives)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def owns_checkpoint(self, path: str) -> bool:
        """Whether ``path`` is a folder of DeepSpeed's, to be read by this strategy.

        Raises:
            MisconfigurationException: it is a file, and ``load_full_weights`` was not set; or a part of such a folder.
        """
        return self._checkpoints.owns(path)

    def verify_checkpoint(self, path: str) -> None:
        """Return if all files of the folder are there as they were written.

        Raises:
            CheckpointError: one is not.
        """
        self._checkpoints.verify(path)

    def save_checkpoint(self, module: nn.Module, rest: Mapping[str, object], path: str) -> None:
        """Write the folder ``path``: the module, its optimizer, and ``rest`` as DeepSpeed's client state.

        Raises:
            CheckpointUnsafe: ``rest`` holds objects that only code could bring back.
        """
        self._checkpoints.save(self._engines.training(module), rest, path)

    def read_rest(self, path: str, weights_only: bool | None) -> dict[str, object]:
        """What was saved beside the module and its optimizer.

        Raises:
            CheckpointError: there is no whole folder of DeepSpeed's, or it would have to run code.
        """
        return self._checkpoints.read_rest(path, weights_only)

    def load_checkpoint(
        self, module: nn.Module, path: str, *, optimizers: bool, strict: bool, weights_only: bool | None = None
    ) -> None:
        """Load the module from the folder ``path``, and the state of its optimizer, of any number of ranks."""
        self._checkpoints.load(
            self._engines.entry(module), path, optimizers=optimizers, strict=strict, weights_only=weights_only
        )
