"""DDP: every process holds the whole model and a part of the batch; gradients are averaged while backward runs."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError, did_you_mean
from fulmen_protocols.strategy import StrategyParts
from fulmen_strategies._averaging import average_after_steps, check_averaging
from fulmen_strategies._entry import Entry, enter
from fulmen_strategies._module_init import created_on
from fulmen_strategies._rank_place import DEFAULT_TIMEOUT, OnRanks, RankPlace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextlib import AbstractContextManager
    from datetime import timedelta

    from torch import Tensor, nn
    from torch._C._distributed_c10d import GradBucket
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
    from torch.futures import Future
    from torch.optim import Optimizer

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.cluster_environment import ClusterEnvironment
    from fulmen_protocols.precision import Precision
    from fulmen_protocols.topology import Topology

    CommHook = Callable[[Any, GradBucket], Future[Tensor]]

__all__ = ["DDPStrategy", "find_unused_parameters"]

_LAUNCHERS = {"popen": "local", "spawn": "spawn", "fork": "fork", "forkserver": "forkserver"}


class DDPStrategy(OnRanks):
    """Distributed data parallel training by ``torch.nn.parallel.DistributedDataParallel``.

    Args:
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; ``None``: torch's default for the device.
        timeout: after which a rank that waits for others in a collective gives up.
        start_method: how the processes of this node come to be: ``"popen"`` re-executes the program; ``"spawn"``,
            ``"fork"`` and ``"forkserver"`` run each call of a Trainer in new processes.
        accelerator: parts of the run may be given here, instead of to the Trainer or Fabric: this one,
        parallel_devices: the devices of this node, one per process,
        cluster_environment: where processes stand,
        checkpoint_io: how checkpoints are written,
        precision_plugin: and the precision.
        ddp_comm_hook: replaces the all-reduce of each gradient bucket (``ddp_comm_hooks`` of torch).
        ddp_comm_state: first argument of the hook.
        ddp_comm_wrapper: applied to the hook, for example ``fp16_compress_wrapper``.
        model_averaging_period: with ``post_localSGD_hook`` and its ``PostLocalSGDState``: after ``start_localSGD_iter``
            steps the parameters, instead of the gradients, are averaged over all ranks after every so many steps of
            an optimizer.
        kwargs: for DistributedDataParallel: ``find_unused_parameters``, ``static_graph``,
            ``gradient_as_bucket_view``, ``bucket_cap_mb``, ...

    Raises:
        MisconfigurationException: a start method or an option that there is not.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        *,
        accelerator: Accelerator | None = None,
        parallel_devices: Sequence[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        ddp_comm_hook: CommHook | None = None,
        ddp_comm_state: object | None = None,
        ddp_comm_wrapper: Callable[[CommHook], CommHook] | None = None,
        model_averaging_period: int | None = None,
        **kwargs: object,
    ) -> None:
        if start_method not in _LAUNCHERS:
            raise MisconfigurationException(
                f"DDPStrategy got start_method={start_method!r}.{did_you_mean(str(start_method), _LAUNCHERS)} There "
                f"are {', '.join(map(repr, _LAUNCHERS))}."
            )
        if ddp_comm_hook is None and (ddp_comm_wrapper is not None or ddp_comm_state is not None):
            raise MisconfigurationException(
                "ddp_comm_wrapper and ddp_comm_state belong to a hook, but ddp_comm_hook is None: give one."
            )
        check_averaging(ddp_comm_state, model_averaging_period)
        _check_options(kwargs)
        self._averaging_period = model_averaging_period
        self._launcher = _LAUNCHERS[start_method]
        self._parts = StrategyParts(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self._rank = RankPlace("DDPStrategy", process_group_backend, timeout)
        self._comm_hook = ddp_comm_hook
        self._comm_state = ddp_comm_state
        self._comm_wrapper = ddp_comm_wrapper
        self._options: dict[str, Any] = kwargs

    @property
    def launcher(self) -> str:
        """``"local"`` for ``"popen"``, otherwise the start method's own name."""
        return self._launcher

    @property
    def parts(self) -> StrategyParts:
        """The parts of the run that were given to this strategy."""
        return self._parts

    def setup_environment(self, topology: Topology) -> None:
        """Join the process group, or take over the one that exists. Calling it again changes nothing.

        Raises:
            MisconfigurationException: an existing group has another rank or size than ``topology``.
            BackendUnavailable: this build of torch lacks the backend.
        """
        self._rank.take(topology)

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Create modules on the device; with ``empty`` without initialising them."""
        return created_on(self.root_device, empty=empty)

    def place(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the device in place and wrap it; all ranks start with the weights of rank 0.

        A module that has nothing to train gets no wrapper: DDP refuses it, and there is nothing to reduce.
        """
        module = module.to(self.root_device)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return self.place_for_inference(module)
        # Without device_ids DDP leaves inputs alone. With them it would rebuild every batch's containers only to find
        # that its tensors are where they should be.
        placed = DistributedDataParallel(Entry(module), **self._options)
        _outlive(placed.reducer, cast("object", placed.process_group))
        if self._comm_hook is not None:
            hook = self._comm_hook if self._comm_wrapper is None else self._comm_wrapper(self._comm_hook)
            placed.register_comm_hook(self._comm_state, hook)
        return placed

    def place_for_inference(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the device in place, with the weights and buffers of rank 0, and return it unwrapped."""
        module = module.to(self.root_device)
        for tensor in (*module.parameters(), *module.buffers()):
            self.collectives.broadcast(tensor)
        return module

    def place_for_plan(self, module: nn.Module, device: torch.device) -> tuple[nn.Module, dict[str, int]]:
        """``module`` unwrapped, and the bytes of the buckets in which DDP would reduce its gradients.

        Where gradients are views of the buckets there is nothing beside them.
        """
        trained = [parameter for parameter in module.to(self.root_device).parameters() if parameter.requires_grad]
        if self._options.get("gradient_as_bucket_view"):
            return module, {}
        return module, {"gradient buckets": sum(each.numel() * each.element_size() for each in trained)}

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """The original module's method ``name``, run inside DDP's forward; ``"forward"`` with its own hooks."""
        wrapper = _as_wrapper(placed)
        if wrapper is None:
            return placed if name == "forward" else getattr(placed, name)
        entry = wrapper.module
        return enter(wrapper, entry, entry.module if name == "forward" else getattr(entry.module, name))

    def bind_manual_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """As ``bind_method``, for a method that itself runs backward, each time within ``manual_backward``."""
        wrapper = _as_wrapper(placed)
        if wrapper is None:
            return self.bind_method(placed, name)
        method = getattr(wrapper.module.module, name)

        def run_and_hide_from_ddp(*args: object, **kwargs: object) -> object:
            output = method(*args, **kwargs)
            # The backward passes are over when DDP's forward ends: it must not make ready for another one, or the
            # next backward that is not to be synchronised would be reduced all the same.
            wrapper.require_backward_grad_sync = False
            return output

        through_wrapper = enter(wrapper, wrapper.module, run_and_hide_from_ddp)

        def through_wrapper_and_restore(*args: object, **kwargs: object) -> object:
            syncing = wrapper.require_backward_grad_sync
            try:
                return through_wrapper(*args, **kwargs)
            finally:
                wrapper.require_backward_grad_sync = syncing
                wrapper.require_forward_param_sync = syncing  # else buffers would no longer be broadcast

        return through_wrapper_and_restore

    @contextlib.contextmanager
    def manual_backward(self, placed: nn.Module, loss: Tensor) -> Generator[None]:
        """Within the block, ``loss.backward()`` in a manually bound method averages its gradients over ranks."""
        wrapper = _as_wrapper(placed)
        if wrapper is None or not (wrapper.require_backward_grad_sync and torch.is_grad_enabled()):
            yield
            return
        reducer = wrapper.reducer
        # A second backward in one forward would otherwise find the bucket order recorded twice.
        reducer._rebuild_buckets()  # pyright: ignore[reportPrivateUsage]
        searching = wrapper.find_unused_parameters and not wrapper.static_graph
        reducer.prepare_for_backward([loss] if searching else [])
        yield
        if wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued:  # pyright: ignore[reportPrivateUsage]
            # The first iteration of a static graph only counts; DDP reduces after it. It enqueues that through the
            # forward's output, which a manual backward does not pass.
            cast("Any", reducer)._delay_all_reduce()  # torch's stubs lack it
            wrapper._static_graph_delay_allreduce_enqueued = True  # pyright: ignore[reportPrivateUsage]

    def no_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Within the block, forward and backward leave gradients local to this rank."""
        wrapper = _as_wrapper(module)
        return contextlib.nullcontext() if wrapper is None else wrapper.no_sync()

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``; with a ``model_averaging_period`` each averages its parameters from now on.

        Raises:
            MisconfigurationTypeError: an optimizer that communicates itself is to have its parameters averaged.
        """
        if self._averaging_period is not None:
            average_after_steps(optimizers, self._averaging_period, cast("PostLocalSGDState", self._comm_state))
        return optimizers

    def advice(self, placed: nn.Module) -> str | None:
        """What training with ``placed`` has shown to be worth changing: a graph that turned out to be static."""
        wrapper = _as_wrapper(placed)
        if wrapper is None or not wrapper.find_unused_parameters or wrapper.static_graph:
            return None
        if not cast("Any", wrapper.reducer)._ddp_graph_static():
            return None
        return (
            "DDPStrategy(find_unused_parameters=True) looked for unused parameters after every forward pass, and found "
            "the same ones each time. DDPStrategy(static_graph=True) looks only once."
        )

    def drifted_parameters(self, module: nn.Module) -> list[str]:
        """Names of the parameters whose bits differ between ranks, the same list on every rank; in a sound run none.

        Costs one pass over the weights and one all-reduce of two numbers per parameter; the host waits for the device.
        """
        wrapper = _as_wrapper(module)
        named = list((module if wrapper is None else wrapper.module.module).named_parameters())
        if not named:
            return []
        sums = torch.stack([_bit_sum(parameter) for _, parameter in named])
        extremes = self.collectives.all_reduce(torch.cat([sums, ~sums]), "max")
        largest, smallest = extremes[: len(named)], ~extremes[len(named) :]
        differing = cast("list[int]", (largest != smallest).nonzero().flatten().tolist())
        return [named[i][0] for i in differing]

    def teardown(self) -> None:
        """Leave the process group if this strategy has made it. May be called twice."""
        self._rank.leave()


def find_unused_parameters(**options: Any) -> DDPStrategy:
    """A DDPStrategy with ``find_unused_parameters=True``: a backward pass may leave parameters without gradient."""
    return DDPStrategy(find_unused_parameters=True, **options)


class _Wrapper(DistributedDataParallel):
    """For type checkers: DDP around an entry."""

    module: Entry


def _as_wrapper(placed: nn.Module) -> _Wrapper | None:
    return placed if isinstance(placed, DistributedDataParallel) else None  # type: ignore[return-value]


def _outlive(reducer: object, group: object) -> None:
    """Keep ``group`` until ``reducer`` is gone.

    A wrapper is often collected after teardown has destroyed the group. If its reducer then held the group's last
    reference, it would join the group's threads without releasing the GIL, while such a thread needs the GIL to drop
    the Python state of its last piece of work: both wait for ever (seen with gloo in torch 2.13). The group's own
    Python object releases the GIL when it goes.
    """
    weakref.finalize(reducer, id, group).atexit = False


def _check_options(options: dict[str, object]) -> None:
    known = set(inspect.signature(cast("type", DistributedDataParallel)).parameters) - {"module"}
    for name in options:
        if name not in known:
            raise MisconfigurationTypeError(
                f"DDPStrategy got an option {name!r} that DistributedDataParallel does not have."
                f"{did_you_mean(name, known)} It has: {', '.join(sorted(known))}."
            )


def _bit_sum(parameter: Tensor) -> Tensor:
    """Sum of the parameter's bits read as integers, modulo 2**64; shape ``()``, int64."""
    flat = parameter.detach().contiguous().reshape(-1)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.uint8)
    return flat.view(integer).sum(dtype=torch.int64)
