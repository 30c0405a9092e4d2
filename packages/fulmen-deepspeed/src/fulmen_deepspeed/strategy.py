"""DeepSpeedStrategy: training by DeepSpeed's engine, with ZeRO's stages, offloading and sharded checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fulmen_deepspeed import _optimizers, _states, _verify
from fulmen_deepspeed import config as config_module
from fulmen_deepspeed._casting import SINGLE, Casting
from fulmen_deepspeed._checkpoint import EngineCheckpoints
from fulmen_deepspeed._entry import EngineEntry, entry_of, forget_entry
from fulmen_deepspeed._library import deepspeed_for, require_deepspeed
from fulmen_deepspeed._module_init import created_on
from fulmen_deepspeed._process_group import ProcessGroup
from fulmen_deepspeed.collectives import EngineCollectives
from fulmen_protocols import StrategyParts
from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer

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
        given = dict(locals())
        require_deepspeed()
        self._config = _config_from(given)
        self._logs_throughput = logging_level <= logging.INFO
        if precision is not None and precision_plugin is not None:
            raise MisconfigurationException(
                "DeepSpeedStrategy got precision and precision_plugin, which are the same. Give one of the two."
            )
        self._parts = StrategyParts(
            accelerator, parallel_devices, cluster_environment, None, precision_plugin or precision
        )
        self._scale = config_module.LossScale(
            loss_scale, initial_scale_power, loss_scale_window, hysteresis, min_loss_scale
        )
        self._remote_device = remote_device
        self._backend = process_group_backend
        self._timeout = _DEFAULT_TIMEOUT if timeout is None else timeout
        self._logging_level = logging_level
        self._from_run = config_module.FromRun()
        self._casting = Casting(SINGLE)
        self._deepspeed: Any = None  # the library, once the kind of device is known
        self._local_rank = 0
        self._device: torch.device | None = None
        self._kind: str | None = None
        self._group = ProcessGroup()
        self._collectives: EngineCollectives | None = None
        self._checkpoints = EngineCheckpoints(
            exclude_frozen=exclude_frozen_parameters, load_full_weights=load_full_weights
        )
        self._entries: list[EngineEntry] = []

    # -- before anything starts ---------------------------------------------------------------------------------------

    @property
    def config(self) -> config_module.Config:
        """DeepSpeed's configuration as it stands, without what the run decides."""
        return self._config

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
        return config_module.stage_of(self._config)

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Compare the arguments with the devices of each node.

        Raises:
            MisconfigurationException: DeepSpeed cannot drive them, or finds them under other numbers.
            BackendUnavailable: offloading to NVMe was asked for, and this machine cannot.
        """
        _verify.devices(devices)
        _verify.nvme(self._config)
        self._kind = devices[0].type

    def apply_precision_plan(self, plan: PrecisionPlan) -> None:
        """Take over the dtype of computation.

        Raises:
            MisconfigurationException: the engine does not compute in it, here or at all, or the configuration says
                something else.
        """
        config_module.with_precision(self._config, plan, self._scale, self._kind or "cuda")
        self._casting = Casting(plan)

    def set_accumulation(self, batches: int) -> None:
        """Let the engine step after so many batches.

        Raises:
            MisconfigurationException: the configuration has a number of its own.
        """
        config_module.check_accumulation(self._config)
        self._from_run = _replaced(self._from_run, accumulation=batches)

    def set_clipping(self, value: float | None, algorithm: Literal["norm", "value"] = "norm") -> None:
        """Let the engine clip gradients to the norm ``value`` before each step; None leaves it to the configuration.

        Raises:
            MisconfigurationException: clipping by value, or the configuration has another norm.
        """
        config_module.check_clipping(self._config, value, algorithm)
        self._from_run = _replaced(self._from_run, clipping=value)

    @property
    def wants_batch_size(self) -> bool:
        """Whether the number of samples in a batch is still unknown."""
        known = ("train_micro_batch_size_per_gpu", "train_batch_size")
        return not any(name in self._config for name in known)

    def set_batch_size(self, samples: int) -> None:
        """Learn the number of samples in a batch of one rank; DeepSpeed's log of its throughput counts with it."""
        self._from_run = _replaced(self._from_run, batch_size=samples)

    @property
    def makes_optimizers(self) -> bool:
        """Whether the configuration defines the optimizer."""
        return "optimizer" in self._config

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
        if self._device is None:
            raise _too_early("root_device")
        return self._device

    @property
    def collectives(self) -> EngineCollectives:
        """Communication among this run's ranks.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        if self._collectives is None:
            raise _too_early("collectives")
        return self._collectives

    def setup_environment(self, topology: Topology) -> None:
        """Join the process group, or take over the one that exists. Calling it again changes nothing.

        Raises:
            MisconfigurationException: an existing group has another rank or size.
            BackendUnavailable: torch lacks the backend, or DeepSpeed drives another kind of device.
        """
        self.check_world(topology.devices, topology.num_nodes)
        self._deepspeed = deepspeed_for(topology.device.type, self._logging_level)
        self._group.join(topology, self._backend, self._timeout)
        self._device = topology.device
        self._local_rank = topology.local_rank
        self._collectives = EngineCollectives(topology.device)
        self._checkpoints.collectives = self._collectives

    def teardown(self) -> None:
        """Take the engines apart and leave the process group if this strategy has made it. May be called twice."""
        for entry in self._entries:
            _dismantle(entry)
        self._entries = []
        self._group.leave()
        self._collectives = None
        self._device = None

    # -- modules ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def module_context(self, *, empty: bool) -> Generator[None]:
        """Create modules on the device, in stage 3 each parameter spread over the ranks as soon as it is made.

        With ``empty`` the initialisers of ``torch.nn`` do nothing.
        """
        with ExitStack() as stack:
            if self.stage == 3:
                stack.enter_context(
                    self._deepspeed.zero.Init(
                        enabled=True, remote_device=self._remote_device, config_dict_or_path=self._engine_config()
                    )
                )
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
        before = entry_of(module)
        if before is not None:
            if before.engine is not None and before in self._entries:
                return before
            _dismantle(before)
            module = before.module
        if not _states.is_partitioned(module):
            plan = self._casting.plan
            dtype = plan["parameter"] if plan["parameter"] == plan["compute"] != torch.float32 else None
            module = module.to(self.root_device, dtype)
            for tensor in (*module.parameters(), *module.buffers()):
                self.collectives.broadcast(tensor)
        entry = EngineEntry(module, self._casting, self.root_device)
        if self.stage == 3:
            entry.make_engine = partial(self._make_evaluation_engine, entry)
        self._entries.append(entry)
        return entry

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
        entry = self._entry(placed)
        return entry if name == "forward" else partial(entry.run, getattr(entry.module, name))

    def bind_manual_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """As ``bind_method``, for a method that itself runs backward passes, each within ``manual_backward``."""
        entry = self._entry(placed)
        return partial(entry.run_manual, getattr(entry.module, name))

    def manual_backward(self, placed: nn.Module, loss: Tensor) -> AbstractContextManager[None]:
        """Surrounds each backward pass inside a manually bound method."""
        return self._entry(placed).manual_backward()

    # -- training -----------------------------------------------------------------------------------------------------

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Make the engine, and return the optimizer that it steps: the one given, or that of the configuration.

        Without either the module is ready for evaluation only.

        Raises:
            MisconfigurationException: several optimizers, one that DeepSpeed cannot step, or two definitions of one.
        """
        entry = self._entry(module)
        _optimizers.check(optimizers, entry.module, self._config)
        if not optimizers and not self.makes_optimizers:
            return []
        if entry.engine is not None:
            _take_down_engine(entry)
        layout = _optimizers.Layout.of(optimizers[0]) if optimizers else None
        engine = self._initialize(entry.module, self._engine_config(), next(iter(optimizers), None))
        entry.attach(engine, trains=True)
        self._configure_activation_checkpointing()
        optimizer = engine.basic_optimizer
        _optimizers.adopt(optimizer, engine, layout)
        return [optimizer]

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
        self._trained(module).backward(loss, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        """Run ``closure`` if there is one, then let the engine count the batch and step where a window ends."""
        if closure is not None:
            closure()
        return self._trained(module).step()

    def set_window_end(self, module: nn.Module | None, is_end: bool) -> None:
        """Say whether the next backward pass is the last one before an optimizer step."""
        self._trained(module).set_gradient_accumulation_boundary(is_end)

    def take_scheduler(self, module: nn.Module, scheduler: object) -> None:
        """Let the engine step ``scheduler`` after each of its optimizer steps."""
        self._trained(module).lr_scheduler = scheduler

    def release_schedulers(self, module: nn.Module) -> Sequence[object]:
        """The scheduler of the configuration, if it has one; the engine steps it no longer."""
        engine = self._trained(module)
        scheduler, engine.lr_scheduler = engine.lr_scheduler, None
        return [] if scheduler is None else [scheduler]

    # -- state --------------------------------------------------------------------------------------------------------

    def module_state(self, module: nn.Module, *, full: bool) -> Mapping[str, object]:
        """State by canonical name, in the plan's dtype of parameters; ``full``: whole CPU tensors on rank 0.

        While an engine trains, those are its float32 weights, from which it makes the ones it computes with.
        """
        entry = self._entry(module)
        return _states.module_state(entry, full=full, rank=self.collectives.rank)

    def load_module_state(self, module: nn.Module, state: Mapping[str, object], *, strict: bool) -> object:
        """Load what ``module_state`` gave, of either kind; returns what did not meet, as torch does."""
        return _states.load_module_state(self._entry(module), state, self.collectives, strict=strict)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, full: bool) -> Mapping[str, object]:
        """State in torch's layout; ``full``: whole CPU tensors on rank 0, otherwise the part of this rank."""
        return _optimizers.state(self._entry(module), optimizer, full=full, rank=self.collectives.rank)

    def load_optimizer_state(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, object]) -> None:
        """Load what ``optimizer_state`` gave, of either kind."""
        _optimizers.load_state(self._entry(module), optimizer, state, self.collectives)

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
        self._checkpoints.save(self._trained(module), rest, path)

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
            self._entry(module), path, optimizers=optimizers, strict=strict, weights_only=weights_only
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _entry(self, placed: nn.Module) -> EngineEntry:
        entry = entry_of(placed)
        if entry is None:
            raise MisconfigurationTypeError(
                f"DeepSpeedStrategy was given a {type(placed).__name__} that it has not placed. Call place() first."
            )
        return entry

    # Any: DeepSpeed has no type information.
    def _trained(self, placed: nn.Module | None) -> Any:
        """The engine that trains ``placed``, or the only one there is."""
        if placed is None:
            training = [entry for entry in self._entries if entry.trains]
            if len(training) != 1:
                raise MisconfigurationException(
                    f"DeepSpeedStrategy has {len(training)} engines that train, and was not told which one is meant. "
                    "Give the module."
                )
            return training[0].engine
        entry = placed if isinstance(placed, EngineEntry) else self._entry(placed)
        if not entry.trains:
            raise MisconfigurationException(
                f"{type(entry.module).__name__} has no optimizer yet, and DeepSpeed's engine is made with it. Set both "
                "up together: model, optimizer = fabric.setup(model, optimizer)."
            )
        return entry.engine

    def _engine_config(self) -> config_module.Config:
        plan, kind = self._casting.plan, self.root_device.type
        made = config_module.with_precision(self._config, plan, self._scale, kind)
        return config_module.for_engine(made, self._from_run, logs_throughput=self._logs_throughput)

    def _initialize(self, module: nn.Module, settings: config_module.Config, optimizer: Optimizer | None) -> Any:
        device = self.root_device
        index = self._local_rank if device.type == "cpu" else device.index
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if optimizer is None and "optimizer" not in settings:
            parameters = []
        engine, _, _, _ = self._deepspeed.initialize(
            args=Namespace(device_rank=index),
            config=settings,
            model=module,
            model_parameters=parameters,
            optimizer=optimizer,
            dist_init_required=False,
        )
        return engine

    def _make_evaluation_engine(self, entry: EngineEntry) -> None:
        made = config_module.for_evaluation(self._engine_config())
        entry.attach(self._initialize(entry.module, made, None), trains=False)

    def _configure_activation_checkpointing(self) -> None:
        wanted: Any = self._config.get("activation_checkpointing")
        if not isinstance(wanted, Mapping) or not any(wanted.values()):
            return
        self._deepspeed.checkpointing.configure(
            mpu_=None,
            partition_activations=wanted.get("partition_activations"),
            contiguous_checkpointing=wanted.get("contiguous_memory_optimization"),
            num_checkpoints=wanted.get("number_checkpoints"),
            checkpoint_in_cpu=wanted.get("cpu_checkpointing"),
            synchronize=wanted.get("synchronize_checkpoint_boundary"),
            profile=wanted.get("profile"),
        )


def _config_from(given: Mapping[str, Any]) -> config_module.Config:
    """The user's own configuration, which then is alone, or that of the arguments."""
    own, source = config_module.load_config(given["config"])
    if own is None:
        config_module.check_options(given)
        return config_module.default_config(given)
    _verify.no_arguments_beside(DeepSpeedStrategy, given, source)
    return own


def _replaced(run: config_module.FromRun, **changes: Any) -> config_module.FromRun:
    return dataclasses.replace(run, **changes)


def _dismantle(entry: EngineEntry) -> None:
    """Let go of a module: nothing of the engine stays in it but, in stage 3, its parameters' places."""
    _take_down_engine(entry)
    forget_entry(entry.module)


def _take_down_engine(entry: EngineEntry) -> None:
    engine = entry.engine
    entry.attach(None, trains=False)
    if engine is not None:
        engine.destroy()
        _states.unhook(entry.module)


def _too_early(name: str) -> RuntimeError:
    return RuntimeError(f"{name} of DeepSpeedStrategy is unknown until setup_environment has run: call it first.")
