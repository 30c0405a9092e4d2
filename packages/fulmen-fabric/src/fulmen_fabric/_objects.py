"""What a Fabric makes of the user's objects: modules, optimizers, loaders, and callbacks that hear of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fulmen_fabric import _arguments
from fulmen_fabric._callbacks import adopt, call_each, give_optimizers, installed_callbacks
from fulmen_fabric._checkpoints import Checkpoints
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from fulmen_fabric.assembly import Assembly
    from fulmen_fabric.loaders import FabricDataLoader
    from fulmen_fabric.wrappers import FabricModule

__all__ = ["Objects"]

# Optimizers come back as of their own class, and a scheduler as it is.
O1 = TypeVar("O1", bound="Optimizer")
O2 = TypeVar("O2", bound="Optimizer")
S = TypeVar("S")


class Objects(Checkpoints):
    """What of a Fabric has to do with the user's objects."""

    def __init__(self, assembly: Assembly, callbacks: object | Sequence[object] | None) -> None:
        super().__init__(assembly)
        self._callbacks: list[object] = [*_arguments.as_list(callbacks), *installed_callbacks()]

    @overload
    def setup(
        self, module: nn.Module, *, scheduler: None = None, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> FabricModule: ...
    @overload
    def setup(
        self,
        module: nn.Module,
        optimizer: O1,
        /,
        *,
        scheduler: None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> tuple[FabricModule, O1]: ...
    @overload
    def setup(
        self,
        module: nn.Module,
        optimizer: O1,
        second: O2,
        /,
        *,
        scheduler: None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> tuple[FabricModule, O1, O2]: ...
    @overload
    def setup(
        self,
        module: nn.Module,
        optimizer: O1,
        /,
        *,
        scheduler: S,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> tuple[FabricModule, O1, S]: ...
    # Any: a tuple of the module, any number of optimizers, and the scheduler if there is one.
    @overload
    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: object | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any: ...
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
            optimizers: made from its parameters. None: for evaluation, or where an engine makes its own.
            scheduler: returned as it is, last; an engine that steps schedulers steps it.
            move_to_device: False leaves the module on its device, where the strategy allows that.
            _reapply_compile: whether a module from ``torch.compile`` is compiled again around the strategy's wrapper;
                False compiles the module alone, inside the wrapper.

        Returns:
            The wrapped module; with optimizers, given or an engine's own, a tuple ``(module, *optimizers)``, and the
            scheduler if one was given.

        Raises:
            MisconfigurationException: something was set up before, or is neither module nor optimizer.
            RuntimeError: there are several processes, and they have not been launched.
        """
        self._started("setup")
        _arguments.require_module("setup", module)
        for optimizer in optimizers:
            _arguments.require_optimizer("setup", optimizer)
        wrapped = self._composer.place(module, self.device, move=move_to_device, recompile=_reapply_compile)
        ready = self._wrap_optimizers(wrapped.placed, optimizers)
        self._after_setup(wrapped, ready)
        if scheduler is not None:
            self._composer.take_scheduler(wrapped.placed, scheduler)
        if not ready and scheduler is None:
            return wrapped
        return (wrapped, *ready) if scheduler is None else (wrapped, *ready, scheduler)

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> FabricModule:
        """Place a module whose optimizers will be made afterwards, from the parameters of what this returns.

        Arguments and errors are those of ``setup``.
        """
        self._started("setup_module")
        _arguments.require_module("setup_module", module)
        wrapped = self._composer.place(module, self.device, move=move_to_device, recompile=_reapply_compile)
        self._after_setup(wrapped, ())
        return wrapped

    @overload
    def setup_optimizers(self, optimizer: O1, /) -> O1: ...
    @overload
    def setup_optimizers(self, optimizer: O1, second: O2, /) -> tuple[O1, O2]: ...
    # Any: one optimizer, or a tuple of them.
    @overload
    def setup_optimizers(self, *optimizers: Optimizer) -> Any: ...
    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Wrap optimizers made from a module that ``setup_module`` returned: one, or a tuple of several.

        Raises:
            MisconfigurationException: none was given, one was set up before or is on the meta device.
        """
        self._started("setup_optimizers")
        if not optimizers:
            raise MisconfigurationException("setup_optimizers() was given no optimizer. Pass at least one.")
        for optimizer in optimizers:
            _arguments.require_optimizer("setup_optimizers", optimizer)
            _arguments.require_no_meta(optimizer)
        placed = self._composer.placed_for(optimizers)
        ready = self._wrap_optimizers(placed, optimizers)
        give_optimizers(self._composer.module_of(placed), ready)
        return ready[0] if len(ready) == 1 else tuple(ready)

    def _wrap_optimizers(self, placed: nn.Module | None, optimizers: Sequence[Optimizer]) -> list[Optimizer]:
        found = [getattr(one, "on_after_optimizer_step", None) for one in self._callbacks]
        after = [partial(hook, self.strategy) for hook in found if callable(hook)]
        return self._composer.wrap_optimizers(placed, optimizers, after)

    def _after_setup(self, wrapped: FabricModule, optimizers: Sequence[Optimizer]) -> None:
        if adopt(self, wrapped.module, optimizers) and not any(one is wrapped.module for one in self._callbacks):
            self._callbacks.append(wrapped.module)
        self.call("on_after_setup", fabric=self, module=wrapped)

    @overload
    def setup_dataloaders(
        self,
        dataloader: DataLoader[Any],
        /,
        *,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        prefetch: int = 0,
    ) -> FabricDataLoader: ...
    @overload
    def setup_dataloaders(
        self,
        first: DataLoader[Any],
        second: DataLoader[Any],
        /,
        *more: DataLoader[Any],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        prefetch: int = 0,
    ) -> list[FabricDataLoader]: ...
    # Any: one loader, or a list of them.
    @overload
    def setup_dataloaders(
        self,
        *dataloaders: DataLoader[Any],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        prefetch: int = 0,
    ) -> Any: ...
    def setup_dataloaders(
        self,
        *dataloaders: DataLoader[Any],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        prefetch: int = 0,
    ) -> Any:
        """Give each rank its part of the data, on its device: one loader, or a list. Each ``iter`` is one epoch.

        Args:
            dataloaders: yours; their samplers are kept, and split over ranks where there are several.
            use_distributed_sampler: False reads what the loader itself chooses, on every rank.
            move_to_device: False leaves batches where they are.
            prefetch: batches on their way to a CUDA device while it computes; overlaps where loaders pin their memory.
                On a CPU there is nothing to copy, and it does nothing.

        Raises:
            MisconfigurationException: none was given, one is no ``DataLoader``, was set up before or cannot be split;
                ``prefetch`` is negative, or asked for with ``move_to_device=False``.
        """
        self._started("setup_dataloaders")
        if not dataloaders:
            raise MisconfigurationException("setup_dataloaders() was given no loader. Pass at least one.")
        for loader in dataloaders:
            _arguments.require_loader(loader)
        _arguments.require_prefetch(prefetch, move_to_device)
        move = self._mover() if move_to_device else None
        split = use_distributed_sampler
        ready = [self._loaders.make(one, split=split, move=move, prefetch=prefetch) for one in dataloaders]
        return ready[0] if len(ready) == 1 else ready

    def call(self, hook_name: str, *args: object, **kwargs: object) -> None:
        """Call the method ``hook_name`` of every callback that has it; what they return is dropped.

        Keyword arguments that a method does not take are left out.
        """
        call_each(self._callbacks, hook_name, args, kwargs)
