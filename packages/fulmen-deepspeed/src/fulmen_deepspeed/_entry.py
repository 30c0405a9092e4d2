"""The way into a module that DeepSpeed's engine trains, for every call of it or of one of its methods."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import torch

    from fulmen_deepspeed._casting import Casting

__all__ = ["EngineEntry", "entry_of", "forget_entry"]

_MARK = "_fulmen_deepspeed_entry"


class EngineEntry(nn.Module):
    """What ``place`` returns: the user's module, and the engine once there is one.

    The engine wraps the user's own module, so that the names in DeepSpeed's checkpoints are the module's. A method of
    it runs inside the engine's forward, and so inside the module's own call, where ZeRO stage 3 has its parameters
    ready.

    Attributes:
        module: the user's module.
        casting: what the precision means for its calls.
        make_engine: makes an engine for evaluation, where the module cannot compute without one.
    """

    def __init__(self, module: nn.Module, casting: Casting, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self.casting = casting
        self.make_engine: Callable[[], None] | None = None
        self._device = device
        # Boxed: as an attribute the engine would become a submodule, and each parameter be found twice.
        self._engine: list[Any] = [None]
        self._trains = False
        self._is_manual = False
        module.__dict__[_MARK] = self  # not as a submodule either

    # Any: DeepSpeed has no type information.
    @property
    def engine(self) -> Any:
        """DeepSpeed's engine; None before there is one."""
        return self._engine[0]

    @property
    def trains(self) -> bool:
        """Whether the engine has an optimizer."""
        return self._trains

    def attach(self, engine: Any, *, trains: bool) -> None:
        """From now on calls go through ``engine``."""
        self._engine[0], self._trains = engine, trains

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the module; what it returns is in the plan's output dtype."""
        return self.casting.output(self.run(None, *args, **kwargs))

    def run(self, method: Callable[..., object] | None, *args: object, **kwargs: object) -> Any:
        """Run ``method`` of the module, or the module, with inputs in the dtype of computation."""
        casting = self.casting
        if self.engine is None and self.make_engine is not None:
            self.make_engine()
        engine, module = self.engine, self.module
        if engine is None:
            function = module if method is None else method
            if casting.plan["parameter"] == casting.plan["compute"]:
                args, kwargs = self._cast(args, kwargs)
            with casting.evaluation(self._device.type):
                return function(*args, **kwargs)
        args, kwargs = self._cast(args, kwargs)
        if method is None:
            return engine(*args, **kwargs)
        if self._is_manual:
            return method(*args, **kwargs)
        with _instead_of_forward(module, method):
            return engine(*args, **kwargs)

    def run_manual(self, method: Callable[..., object], *args: object, **kwargs: object) -> Any:
        """Run a method that itself runs backward passes and steps: outside the engine's forward, which must end first.

        What it calls of the module computes as always: the hooks of ZeRO stage 3 are on the module's layers.
        """
        self._is_manual = True
        try:
            return self.run(method, *args, **kwargs)
        finally:
            self._is_manual = False

    @contextmanager
    def manual_backward(self) -> Generator[None]:
        """Surrounds a backward pass inside ``run_manual``, which the engine's forward has not prepared."""
        prologue = getattr(self.engine, "_backward_prologue", None)
        # Since 0.18 the engine prepares a backward pass by hooks on what its forward returned; before, in backward().
        if self._is_manual and prologue is not None and not inspect.signature(prologue).parameters:
            engine: Any = self.engine
            before, engine._running_engine_backward = engine._running_engine_backward, True
            try:
                prologue()
            finally:
                engine._running_engine_backward = before
        yield

    def _cast(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        casting = self.casting
        if casting.is_single:
            return args, kwargs
        return tuple(casting.inputs(each) for each in args), {k: casting.inputs(v) for k, v in kwargs.items()}


def entry_of(module: nn.Module) -> EngineEntry | None:
    """The entry of a module that was placed before; None for any other."""
    if isinstance(module, EngineEntry):
        return module
    found = module.__dict__.get(_MARK)
    return found if isinstance(found, EngineEntry) else None


def forget_entry(module: nn.Module) -> None:
    """Let ``module`` be placed anew."""
    module.__dict__.pop(_MARK, None)


@contextmanager
def _instead_of_forward(module: nn.Module, method: Callable[..., object]) -> Generator[None]:
    """The next call of ``module`` runs ``method`` in place of ``forward``; calls within that one are plain again."""
    own = module.__dict__
    missing = object()
    before = own.get("forward", missing)

    def restore() -> None:
        if before is missing:
            own.pop("forward", None)
        else:
            own["forward"] = before

    def once(*args: object, **kwargs: object) -> object:
        restore()
        return method(*args, **kwargs)

    own["forward"] = once
    try:
        yield
    finally:
        restore()
