"""The sharded root: every way into a module goes through it, so that its parameters are whole while it computes."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from fulmen_strategies._sharded.casting import Casting

__all__ = ["ShardedEntry", "parameter_groups", "sharded_entry", "spec_of_whole"]

_ENTRY = "_fulmen_sharded_entry"

Call = tuple["Callable[..., object]", tuple[object, ...], dict[str, object]]


class ShardedEntry(nn.Module):
    """Runs ``module`` or one of its methods with whole parameters; ``fully_shard`` is applied to it.

    It is a module of its own around the user's so that the user's class and names stay as they are, and so that a step
    which calls ``self(...)`` is one pass through the root and not two.

    Attributes:
        module: the user's module. Called directly, from a callback say, it comes through here as well.
    """

    def __init__(self, module: nn.Module, casting: Casting, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self._casting = casting
        self._device_type = device.type
        # nn.Module.__setattr__ searches parameters, buffers and submodules; a list item is set in 20 ns.
        self._call: list[Call | None] = [None]
        self._is_inside = [False]
        self._is_manual = [False]
        self._stays_whole = False
        forward = module.forward
        self._forward = forward

        @functools.wraps(forward)
        def enter_first(*args: object, **kwargs: object) -> object:
            return self.run(forward, *args, **kwargs)

        module.__dict__["forward"] = enter_first
        module.__dict__[_ENTRY] = self

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the method that ``run`` was given; called by anybody else, the module."""
        (call,) = self._call
        self._call[0] = None
        casting = self._casting
        with casting.forward(self._device_type):
            if call is not None:
                method, args, kwargs = call
                return method(*casting.inputs(args), **casting.inputs(kwargs))
            self._is_inside[0] = True
            try:
                output = self.module(*casting.inputs(args), **casting.inputs(kwargs))
            finally:
                self._is_inside[0] = False
        return casting.output(output)

    def run(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """``method(*args, **kwargs)`` with whole parameters; inside another run simply that."""
        if self._is_inside[0]:
            return method(*args, **kwargs)
        self._is_inside[0] = True
        # Not as arguments of the call: FSDP would rebuild every batch's containers and cast what is in them.
        self._call[0] = (method, args, kwargs)
        try:
            output = self(None)  # on accelerators FSDP takes apart what it is called with, and fails with nothing
        except BaseException:
            self._recover()
            raise
        finally:
            self._is_inside[0], self._call[0] = False, None
        if not torch.is_grad_enabled() and not self._stays_whole:
            self.sharded.reshard()  # no backward pass will do it, and an optimizer's parameters are the shards
        return output

    @property
    def sharded(self) -> FSDPModule:
        """This module as ``fully_shard`` has made it."""
        return cast("FSDPModule", self)

    def _recover(self) -> None:
        """After an error in the middle of a pass, be ready for the next one."""
        reset = getattr(self, "reset_iter_state", None)  # torch has it from 2.13 on
        if reset is not None:
            with contextlib.suppress(RuntimeError, AttributeError):  # nothing was running yet
                reset()

    # -- backward passes inside a method ------------------------------------------------------------------------------

    def run_manual(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """As ``run``, for a method that runs backward passes and optimizer steps itself."""
        self._is_manual[0] = True
        try:
            return self.run(method, *args, **kwargs)
        finally:
            self._is_manual[0] = False
            self.sharded.reshard()

    @contextlib.contextmanager
    def manual_backward(self, loss: Tensor) -> Generator[None]:
        """Surrounds ``loss.backward()`` inside ``run_manual``: the root's gradients are reduced when it ends.

        FSDP expects a backward pass after its forward has returned, where it prepares the outputs for it. Here the loss
        is prepared, and the root is whole again afterwards for what the method does next.
        """
        if self._is_manual[0] and torch.is_grad_enabled():
            self._state._register_pre_backward_hook(loss)
            yield
            self._make_whole()
        else:
            yield

    def after_step(self) -> None:
        """After an optimizer step: within a manual step the whole parameters are those before it, so gather again."""
        if self._is_manual[0]:
            for group in parameter_groups(self._state):
                group._to_sharded()  # reshard() would keep the root whole until forward has returned
            self._make_whole()

    def _make_whole(self) -> None:
        self._state._pre_forward(self, (), {})

    @property
    def _state(self) -> Any:
        return cast("Any", self)._get_fsdp_state()

    # -- whole for longer ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathered(self) -> Generator[None]:
        """Within the block this rank holds the whole model, and forward passes communicate nothing."""
        self._state._lazy_init()  # it decides what the root does after a forward pass
        units = [module for module in self.modules() if isinstance(module, FSDPModule)]
        groups = [group for unit in units for group in parameter_groups(cast("Any", unit)._get_fsdp_state())]
        before = [group.post_forward_mesh_info for group in groups]
        for unit in units:
            unit.unshard()
        for group in groups:
            group.post_forward_mesh_info = None
        self._stays_whole = True
        try:
            yield
        finally:
            self._stays_whole = False
            for group, info in zip(groups, before, strict=True):
                group.post_forward_mesh_info = info
            for unit in units:
                unit.reshard()


def parameter_groups(state: Any) -> Sequence[Any]:
    """What FSDP2 gathers together in one unit: earlier torch (2.11) has one group for each at most."""
    if hasattr(state, "_fsdp_param_groups"):
        return cast("Sequence[Any]", state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def spec_of_whole(record: Any) -> Any:
    """How a parameter that FSDP2 shards lies on a mesh besides (tensor parallel); None where it does not.

    ``record`` is FSDP2's own of the parameter, in which earlier torch (2.11) has another name for it.
    """
    if not record.is_dtensor:
        return None
    return record._unsharded_dtensor_spec if hasattr(record, "_unsharded_dtensor_spec") else record._tp_spec


def sharded_entry(module: nn.Module) -> ShardedEntry | None:
    """The entry of a module that has been sharded, None for any other."""
    if isinstance(module, ShardedEntry):
        return module
    return cast("ShardedEntry | None", module.__dict__.get(_ENTRY))
