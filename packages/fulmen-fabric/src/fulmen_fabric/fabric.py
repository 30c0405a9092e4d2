"""Fabric: your own loop, with devices, precision, distribution and checkpoints taken care of."""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fulmen_fabric import _arguments
from fulmen_fabric._callbacks import adopt, call_each, installed_callbacks
from fulmen_fabric._communication import all_gather, all_reduce, broadcast
from fulmen_fabric._loaders import prepare_loader
from fulmen_fabric._setup import Composer
from fulmen_fabric._state import load_into, load_raw_into, to_saved
from fulmen_fabric.abilities import supports
from fulmen_fabric.assemble import assemble
from fulmen_fabric.rank_zero import rank_zero_info
from fulmen_fabric.seed import seed_everything
from fulmen_fabric.transfer import convert_tensors_to_scalars, mover
from fulmen_fabric.world import World
from fulmen_fabric.wrappers import FabricModule, unwrap
from fulmen_protocols import (
    LOGGERS,
    MisconfigurationException,
    MisconfigurationTypeError,
    SupportsAsyncSave,
    SupportsForwardContext,
    SupportsShardedSave,
    check,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from os import PathLike

    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from fulmen_fabric.assemble import Assembly
    from fulmen_protocols import Accelerator, Logger, Precision, Strategy

__all__ = ["Fabric"]

T = TypeVar("T")


class Fabric:
    """Runs a loop of your own on any device, in any precision, in one process or many.

    Arguments are Lightning's; the variables ``LT_ACCELERATOR``, ``LT_STRATEGY``, ``LT_DEVICES``, ``LT_NUM_NODES`` and
    ``LT_PRECISION`` override them, so a launcher can choose without a change to the script.

    Args:
        accelerator: a name, ``"gpu"``, ``"auto"`` or an instance.
        strategy: a name, ``"auto"`` or an instance.
        devices: devices per node: a count, ids, a string, or ``"auto"``.
        num_nodes: number of machines.
        precision: for example ``"bf16-mixed"``; None is ``"32-true"``.
        plugins: a ``Precision``, a ``CheckpointIO``, a ``ClusterEnvironment``: at most one of each.
        callbacks: any objects; ``call`` finds their methods by name.
        loggers: where ``log`` writes.

    Raises:
        MisconfigurationException: arguments contradict each other; the message lists every conflict.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        plugins: object | Sequence[object] | None = None,
        callbacks: object | Sequence[object] | None = None,
        loggers: Logger | Sequence[Logger] | None = None,
    ) -> None:
        self._assembly: Assembly = assemble(
            accelerator=_arguments.overridden("accelerator", accelerator),
            strategy=_arguments.overridden("strategy", strategy),
            devices=_arguments.overridden("devices", devices),
            num_nodes=int(_arguments.overridden("num_nodes", num_nodes)),
            precision=_arguments.overridden("precision", precision),
            plugins=plugins,
        )
        self._callbacks: list[object] = [*_arguments.as_list(callbacks), *installed_callbacks()]
        self._loggers: list[Logger] = [check(LOGGERS, one) for one in _arguments.as_list(loggers)]
        self._world = World(self._assembly)
        self._composer = Composer(self._assembly)
        self._backward = self._composer.backward()
        self._move: Callable[[object], object] | None = None
        # A subclass that overrides run gets it started in every process.
        if type(self).run is not Fabric.run:
            self.__dict__["run"] = partial(self._launch_run, self.run)
        for line in self._assembly.chosen:
            rank_zero_info(line)

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator in use."""
        return self._assembly.accelerator

    @property
    def strategy(self) -> Strategy:
        """The strategy in use."""
        return self._assembly.strategy

    @property
    def precision(self) -> Precision:
        """The precision in use. One with a gradient scaler has a ``state_dict`` that belongs into your checkpoints."""
        return self._assembly.precision

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._world.device

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return self._world.rank

    @property
    def local_rank(self) -> int:
        """Index of this process on its node."""
        return self._world.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self._world.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self._world.is_global_zero

    @property
    def loggers(self) -> list[Logger]:
        """All loggers."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger; an ``IndexError`` where there is none."""
        if not self._loggers:
            raise IndexError("this Fabric has no logger. Pass loggers= when you make it.")
        return self._loggers[0]

    def launch(self, function: Callable[..., T] | None = None, *args: object, **kwargs: object) -> T | None:
        """Start the other processes, if nobody has, and join them.

        Runs and returns ``function(fabric, *args, **kwargs)`` in every process; without it the script just goes on.
        With a strategy that makes new processes for the function (``"ddp_spawn"``, ``"ddp_notebook"``), what rank 0's
        returns is all that comes back.

        Raises:
            TypeError: ``function`` cannot be called, or takes no argument for the Fabric.
            MisconfigurationException: the strategy makes new processes, and there is no function for them.
        """
        if function is None and self._world.runs_apart:
            raise MisconfigurationException(
                f"launch() got no function, and strategy {self._assembly.strategy_name!r} runs one in new processes: "
                "put your loop into a function and pass it, launch(main), or use strategy='ddp' in a script."
            )
        if function is None:
            self._world.launch(_arguments.nothing)
            return None
        _arguments.require_callable(function)
        return self._world.launch(partial(function, self, *args, **kwargs))

    # Any: a subclass's run takes and returns what it likes.
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Override it in a subclass to hold your loop: calling it launches and then runs it in every process."""
        raise NotImplementedError(f"{type(self).__name__} does not define run. Override it, or call launch(function).")

    def _launch_run(self, run: Callable[..., object], *args: object, **kwargs: object) -> object:
        return self._world.launch(partial(run, *args, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        # What is composed here is made of closures, which cannot be taken to another process.
        return {name: value for name, value in self.__dict__.items() if name not in ("_backward", "_move", "run")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backward = self._composer.backward()
        self._move = None
        if type(self).run is not Fabric.run:
            self.__dict__["run"] = partial(self._launch_run, self.run)

    def close(self) -> None:
        """Leave the process group, release the device and finish pending writes."""
        self._world.close()
        self._assembly.checkpoint_io.teardown()

    def _finish_saves(self) -> None:
        """What rank 0 is still writing may be what the others are about to read."""
        checkpoint_io = self._assembly.checkpoint_io
        if supports(checkpoint_io, SupportsAsyncSave):
            checkpoint_io.wait()
            self.barrier("saves")

    def _started(self, what: str) -> None:
        """One process needs no launch: it starts at the first call that needs its device."""
        if not self._world.started:
            if self.world_size > 1:
                raise RuntimeError(
                    f"fabric.{what}() was called, but the {self.world_size} processes of this run have not been "
                    "launched. Call fabric.launch() first."
                )
            self._world.start()

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: object | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Place a module and its optimizers for this run.

        Args:
            module: your module, compiled or not; its parameters are moved in place.
            optimizers: made from its parameters.
            scheduler: returned as it is, last; for strategies whose engine steps schedulers.
            move_to_device: False leaves the module on its device, where the strategy allows that.
            _reapply_compile: whether a module from ``torch.compile`` is compiled again around the strategy's wrapper.

        Returns:
            The wrapped module; with optimizers a tuple ``(module, *optimizers)``, and the scheduler if one was given.

        Raises:
            MisconfigurationException: something was set up before.
        """
        self._started("setup")
        _arguments.require_module(module)
        wrapped = self._composer.place(module, self.device, move=move_to_device, recompile=_reapply_compile)
        ready = self._wrap_optimizers(wrapped.placed, optimizers)
        self._after_setup(wrapped, ready)
        if not optimizers and scheduler is None:
            return wrapped
        return (wrapped, *ready) if scheduler is None else (wrapped, *ready, scheduler)

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> FabricModule:
        """Place a module whose optimizers will be made afterwards, from the parameters of what this returns."""
        self._started("setup_module")
        _arguments.require_module(module)
        wrapped = self._composer.place(module, self.device, move=move_to_device, recompile=_reapply_compile)
        self._after_setup(wrapped, ())
        return wrapped

    # Any: one optimizer, or a tuple of them.
    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Wrap optimizers made from a module that ``setup_module`` returned.

        Raises:
            MisconfigurationException: none was given, one was set up before or is on the meta device.
        """
        self._started("setup_optimizers")
        if not optimizers:
            raise MisconfigurationException("setup_optimizers() was given no optimizer. Pass at least one.")
        for optimizer in optimizers:
            _arguments.require_no_meta(optimizer)
        ready = self._wrap_optimizers(self._composer.placed_for(optimizers), optimizers)
        return ready[0] if len(ready) == 1 else tuple(ready)

    def _wrap_optimizers(self, placed: nn.Module | None, optimizers: Sequence[Optimizer]) -> list[Optimizer]:
        for optimizer in optimizers:
            _arguments.require_optimizer(optimizer)
        found = [getattr(one, "on_after_optimizer_step", None) for one in self._callbacks]
        after = [partial(hook, self.strategy) for hook in found if callable(hook)]
        return self._composer.wrap_optimizers(placed, optimizers, after)

    def _after_setup(self, wrapped: FabricModule, optimizers: Sequence[Optimizer]) -> None:
        if adopt(self, wrapped.module, optimizers) and not any(one is wrapped.module for one in self._callbacks):
            self._callbacks.append(wrapped.module)
        self.call("on_after_setup", fabric=self, module=wrapped)

    # Any: one loader, or a list of them.
    def setup_dataloaders(
        self, *dataloaders: DataLoader[Any], use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Give each rank its part of the data, on its device: one loader, or a list. Each ``iter`` is one epoch.

        Raises:
            MisconfigurationException: none was given, one is no ``DataLoader``, was set up before or cannot be split.
        """
        self._started("setup_dataloaders")
        if not dataloaders:
            raise MisconfigurationException("setup_dataloaders() was given no loader. Pass at least one.")
        for loader in dataloaders:
            _arguments.require_loader(loader)
        move = self._mover() if move_to_device else None
        split = use_distributed_sampler
        ready = [prepare_loader(one, self._world, self.strategy, split=split, move=move) for one in dataloaders]
        return ready[0] if len(ready) == 1 else ready

    def _mover(self) -> Callable[[object], object]:
        if self._move is None:
            self._move = mover(self.device)
        return self._move

    def backward(self, tensor: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """``tensor.backward(*args, **kwargs)``, scaled or run by an engine where precision or strategy ask for it.

        ``model`` says which module the loss came from, for engines that hold several.
        """
        self._backward(tensor, model, *args, **kwargs)

    # Any: the norm for max_norm, None for clip_val.
    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of the optimizer's parameters in place, unscaled first where they are scaled.

        Args:
            module: what ``setup`` returned.
            optimizer: what ``setup`` returned.
            clip_val: clamp each element to ``[-clip_val, clip_val]``.
            max_norm: scale all gradients so that their joint norm is at most this.
            norm_type: which norm.
            error_if_nonfinite: fail where the norm is not finite; the host then waits for the device.

        Returns:
            For ``max_norm`` the norm before clipping, shape ``()``; for ``clip_val`` None.

        Raises:
            MisconfigurationException: not exactly one of ``clip_val`` and ``max_norm`` was given.
        """
        if (clip_val is None) == (max_norm is None):
            raise MisconfigurationException(
                f"clip_gradients got clip_val={clip_val!r} and max_norm={max_norm!r}. Give exactly one of the two."
            )
        return self._composer.clip(module, unwrap(optimizer), clip_val, max_norm, norm_type, error_if_nonfinite)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass of this precision runs, for computation outside a wrapped module."""
        precision = self.precision
        return precision.forward_context() if supports(precision, SupportsForwardContext) else nullcontext()

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[object]:
        """Within the block gradients stay local: for all but the last batch of an accumulation.

        Raises:
            MisconfigurationTypeError: ``module`` was not returned by ``setup``.
        """
        if not isinstance(module, FabricModule):
            kind = type(module).__name__
            raise MisconfigurationTypeError(f"no_backward_sync got {kind}. Pass the module that setup() returned.")
        return self._composer.no_sync(module) if enabled else nullcontext()

    @contextmanager
    def init_tensor(self) -> Generator[None, None, None]:
        """Within the block new tensors are on this process's device, in the precision's dtype."""
        self._started("init_tensor")
        with self.device, self._assembly.precision.init_context():
            yield

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Within the block new modules are created where the strategy wants them, in the precision's dtype.

        With ``empty_init`` their values are left undefined, for a checkpoint to fill.
        """
        self._started("init_module")
        with self.strategy.module_context(empty=bool(empty_init)), self.precision.init_context():
            yield

    def to_device(self, obj: T) -> T:
        """Move a module in place, or the tensors of nested collections, to this process's device."""
        self._started("to_device")
        if isinstance(obj, nn.Module):
            return obj.to(self.device)
        return cast("T", self._mover()(obj))

    def print(self, *args: object, **kwargs: Any) -> None:
        """``print`` on the first process of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait for every process."""
        self._started("barrier")
        self._world.collectives.barrier(name or "")

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Rank ``src``'s ``obj``, any picklable object. Device tensors arrive on the own device."""
        self._started("broadcast")
        return broadcast(self._world, self._mover(), obj, src)

    # Any: nested collections of numbers and tensors.
    def all_gather(self, data: Any, group: None = None, sync_grads: bool = False) -> Any:
        """Every rank's tensors, stacked: shape ``(world_size, *shape)``. In one process the data as it is.

        Shapes must be equal on every rank; ``group`` must be None. ``sync_grads``: gradients flow back to each input.
        """
        self._started("all_gather")
        _arguments.require_no_group("all_gather", group)
        return all_gather(self._world, data, sync_grads)

    def all_reduce(self, data: Any, group: None = None, reduce_op: str = "mean") -> Any:
        """Tensors combined over ranks by ``"mean"`` (``"avg"``), ``"sum"``, ``"min"`` or ``"max"``, as new tensors.

        Shapes must be equal on every rank; ``group`` must be None.

        Raises:
            MisconfigurationException: an unknown ``reduce_op``.
        """
        self._started("all_reduce")
        _arguments.require_no_group("all_reduce", group)
        return all_reduce(self._world, data, reduce_op)

    def rank_zero_first(self, local: bool = False) -> AbstractContextManager[None]:
        """Run the block on rank 0 (``local``: the first rank of each node) before the others, however long it takes."""
        self._started("rank_zero_first")
        return self._world.rank_zero_first(local)

    def save(
        self,
        path: str | PathLike[str],
        state: Mapping[str, object],
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write modules, optimizers, what else has ``state_dict``, and plain data. Called by every rank.

        Args:
            path: rank 0's counts; a path or URL.
            state: what to save, by name.
            filter: name in ``state`` to a function of (key, value) that says whether that entry is kept.

        Raises:
            MisconfigurationException: ``filter`` names what is not in ``state``.
        """
        self._started("save")
        target = self.broadcast(os.fspath(path))
        saved = to_saved(state, filter or {})
        checkpoint_io = self._assembly.checkpoint_io
        if supports(checkpoint_io, SupportsShardedSave):
            checkpoint_io.save_sharded(saved, target)
        # A file only rank 0 writes; of a sharded checkpoint every rank writes its part.
        elif self.is_global_zero or self._composer.is_sharded:
            checkpoint_io.save_checkpoint(saved, target)
        self.barrier("save")

    # Any: the user's own objects.
    def load(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint into ``state``. Called by every rank.

        Whatever has ``load_state_dict`` takes its part; other entries of ``state`` are replaced in that very dict.

        Args:
            path: as ``save`` takes it.
            state: what to restore, by name. None: everything is returned.
            strict: whether every name in ``state``, and every weight, must be in the checkpoint.
            weights_only: False runs code from the file; only for files you trust. None means True.

        Returns:
            The rest: what the checkpoint holds under names that ``state`` has not.

        Raises:
            KeyError: strict, and a name is missing.
        """
        self._started("load")
        self._finish_saves()
        self.barrier("load")
        checkpoint = self._assembly.checkpoint_io.load_checkpoint(os.fspath(path), None, weights_only)
        rest = checkpoint if state is None else load_into(state, checkpoint, strict, os.fspath(path))
        self.barrier("load")
        return rest

    def load_raw(
        self,
        path: str | PathLike[str],
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> None:
        """Read a file that holds nothing but the ``state_dict`` of a module or an optimizer. Called by every rank."""
        self._started("load_raw")
        self._finish_saves()
        checkpoint = self._assembly.checkpoint_io.load_checkpoint(os.fspath(path), None, weights_only)
        load_raw_into(obj, checkpoint, strict)

    def call(self, hook_name: str, *args: object, **kwargs: object) -> None:
        """Call the method ``hook_name`` of every callback that has it; what they return is dropped.

        Keyword arguments that a method does not take are left out.
        """
        call_each(self._callbacks, hook_name, args, kwargs)

    def log(self, name: str, value: object, step: int | None = None) -> None:
        """``log_dict`` of one value."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """Send numbers and one-element tensors to every logger, on rank 0. Waits for the device if a value is there."""
        if self._loggers and self.is_global_zero:
            numbers = cast("Mapping[str, float]", convert_tensors_to_scalars(dict(metrics)))
            for logger in self._loggers:
                logger.log_metrics(numbers, step)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed Python, NumPy and torch, and by default loader workers. Returns the seed."""
        return seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)
