"""What ``Fabric.setup`` makes of a module: one whose calls run through strategy and precision."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from copy import deepcopy
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fulmen_fabric.compiled import uncompiled
from fulmen_fabric.loaders import FabricDataLoader
from fulmen_fabric.optimizers import FabricOptimizer
from fulmen_fabric.transfer import map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

__all__ = [
    "FabricModule",
    "FabricOptimizer",
    "is_wrapped",
    "unwrap",
]

T = TypeVar("T")
_STEP_METHODS = ("training_step", "validation_step", "test_step", "predict_step")


class Pass:
    """Everything that surrounds a call of the module: conversions, a context, a look at the outputs.

    Made once at setup; ``around`` composes only what there is, so that a default run calls the module directly.
    """

    def __init__(
        self,
        context: Callable[[], AbstractContextManager[object]] | None = None,
        convert_input: Callable[[object], object] | None = None,
        convert_output: Callable[[object], object] | None = None,
        watch_output: Callable[[object], None] | None = None,
    ) -> None:
        self._context = context
        self._convert_input = convert_input
        self._convert_output = convert_output
        self._watch_output = watch_output

    def around(self, function: Callable[..., object]) -> Callable[..., object]:
        """``function`` within this pass, or ``function`` itself where nothing is to be done."""
        context, convert_input = self._context, self._convert_input
        convert_output, watch_output = self._convert_output, self._watch_output
        if context is None and convert_input is None and convert_output is None and watch_output is None:
            return function
        make_context = nullcontext if context is None else context

        def call(*args: object, **kwargs: object) -> object:
            if convert_input is not None:
                args = tuple([convert_input(arg) for arg in args])
                kwargs = {name: convert_input(value) for name, value in kwargs.items()}
            with make_context():
                output = function(*args, **kwargs)
            if convert_output is not None:
                output = convert_output(output)
            if watch_output is not None:
                watch_output(output)
            return output

        return call


class FabricModule(nn.Module):
    """A view of the user's module whose calls go through the strategy's wrapper and the precision.

    Parameters, buffers and submodules are the module's own, under its own names, so ``state_dict`` has no prefix.
    Other attributes are read from and written to the module. Where the module itself has no ``device`` and no
    ``dtype``, those are of its first parameter.
    """

    def __init__(
        self,
        called: nn.Module,
        placed: nn.Module,
        original: nn.Module,
        around: Pass,
        bind: Callable[[nn.Module, str], Callable[..., object]] | None = None,
        module_state: Callable[[nn.Module], Mapping[str, object]] | None = None,
        load_state: Callable[[nn.Module, Mapping[str, object], bool], object] | None = None,
    ) -> None:
        """Wrap.

        Args:
            called: what a call of this module calls: ``placed``, or that compiled.
            placed: what the strategy's ``place`` returned.
            original: the user's module.
            around: what surrounds each call.
            bind: the strategy's ``bind_method``; None where methods may be called directly.
            module_state: the module's state where one rank does not hold it whole.
            load_state: the way back.
        """
        super().__init__()
        own = self.__dict__
        # One and the same dictionaries: the view has the module's names, and sees what is added later.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[name] = original.__dict__[name]
        own["training"] = original.training
        own["_fabric_called"] = called
        own["_fabric_placed"] = placed
        own["_fabric_original"] = original
        own["_fabric_around"] = around
        own["_fabric_marked"] = set[str]()
        own["_fabric_bind"] = bind
        own["_fabric_module_state"] = module_state
        own["_fabric_load_state"] = load_state
        # nn.Module.__call__ looks forward up on the instance first: nothing of ours stands between.
        own["forward"] = around.around(called)
        for name in _STEP_METHODS:
            if inspect.ismethod(getattr(original, name, None)):
                self.mark_forward_method(name)

    @property
    def module(self) -> nn.Module:
        """The user's module."""
        return cast("nn.Module", self.__dict__["_fabric_original"])

    @property
    def placed(self) -> nn.Module:
        """What the strategy made of the module: its wrapper, or the module itself."""
        return cast("nn.Module", self.__dict__["_fabric_placed"])

    def __deepcopy__(self, memo: dict[int, object]) -> FabricModule:
        # What is composed around the module refers to the module: it is composed again around the copy.
        own = self.__dict__
        called, placed, original = deepcopy((own["_fabric_called"], own["_fabric_placed"], self.module), memo)
        result = FabricModule(
            called,
            placed,
            original,
            own["_fabric_around"],
            own["_fabric_bind"],
            own["_fabric_module_state"],
            own["_fabric_load_state"],
        )
        memo[id(self)] = result
        for name in own["_fabric_marked"]:
            result.mark_forward_method(name)
        return result

    def mark_forward_method(self, method: str | Callable[..., object]) -> None:
        """Let a method of the module run through the strategy and the precision, as ``forward`` does.

        Raises:
            AttributeError: the module has no such method.
            ValueError: ``method`` is ``forward``, which does so already.
        """
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        original = self.module
        if name == "forward":
            raise ValueError("'forward' runs through the strategy already. Mark other methods only.")
        if not inspect.ismethod(getattr(original, name, None)):
            raise AttributeError(f"{type(original).__name__} has no method {name!r} that could be marked.")
        bind = cast("Callable[[nn.Module, str], Callable[..., object]] | None", self.__dict__["_fabric_bind"])
        direct = getattr(original, name) if bind is None else bind(self.__dict__["_fabric_placed"], name)
        self.__dict__["_fabric_marked"].add(name)
        self.__dict__[name] = cast("Pass", self.__dict__["_fabric_around"]).around(direct)

    def train(self, mode: bool = True) -> FabricModule:
        """Set training mode on the module and on what wraps it."""
        self.__dict__["training"] = mode
        cast("nn.Module", self.__dict__["_fabric_placed"]).train(mode)
        self.module.train(mode)
        return self

    # torch declares overloads by how destination is passed; whatever is passed goes on to the module.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The module's state under the module's own names."""
        special = self.__dict__["_fabric_module_state"]
        if special is not None:
            return dict(special(self.__dict__["_fabric_placed"]))
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` gave."""
        special = self.__dict__["_fabric_load_state"]
        if special is not None:
            return special(self.__dict__["_fabric_placed"], state_dict, strict)
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        # nn.Module.__getattr__ would find parameters and submodules only; the module itself finds those, too.
        original = cast("nn.Module", self.__dict__["_fabric_original"])
        if name in ("device", "dtype") and not hasattr(original, name):
            first = next(original.parameters(), None)
            if first is not None:
                return getattr(first, name)
        value = getattr(original, name)
        wrapped = self.__dict__["_fabric_placed"] is not original
        if (
            wrapped
            and self.__dict__["_fabric_bind"] is not None
            and inspect.ismethod(value)
            and value.__self__ is original
        ):
            return _refuse_submodules(value, original)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.__dict__["_fabric_original"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_fabric_original"], name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *self.__dict__, *dir(self.module)})

    def extra_repr(self) -> str:
        """Names the class that is wrapped."""
        return f"wraps {type(self.module).__name__}"


def _refuse_submodules(method: Callable[..., object], original: nn.Module) -> Callable[..., object]:
    """``method``, failing as soon as it runs a submodule: the strategy would not notice that and lose gradients."""

    def refuse(*_: object) -> None:
        name = getattr(method, "__name__", repr(method))
        raise RuntimeError(
            f"{type(original).__name__}.{name} runs the model's layers, but only forward passes through the strategy. "
            f"Call model.mark_forward_method({name!r}) once after setup."
        )

    @wraps(method)
    def call(*args: object, **kwargs: object) -> object:
        handles = [module.register_forward_pre_hook(refuse) for module in original.modules()]
        try:
            return method(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    return call


def require_fabric_backward(is_running: Callable[[], bool], what: str) -> Callable[[object], None]:
    """A watcher of outputs: ``loss.backward()`` on any of them fails where ``fabric.backward`` is needed."""

    def check(_: Tensor) -> None:
        if not is_running():
            raise RuntimeError(
                f"{what} takes part in the backward pass, but loss.backward() was called. Call fabric.backward(loss)."
            )

    def watch(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(check)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return leaf

    def watch_output(output: object) -> None:
        if torch.is_grad_enabled():
            map_leaves(watch, output)

    return watch_output


def is_wrapped(obj: object) -> bool:
    """Whether ``obj`` came out of ``setup``, ``setup_module``, ``setup_optimizers`` or ``setup_dataloaders``."""
    return isinstance(uncompiled(obj), (FabricModule, FabricOptimizer, FabricDataLoader))


def unwrap(obj: T) -> T:
    """The user's own module or optimizer inside ``obj``, or ``obj``."""
    inner: object = uncompiled(obj)
    if isinstance(inner, FabricModule):
        return cast("T", inner.module)
    if isinstance(obj, FabricOptimizer):
        return cast("T", obj.optimizer)
    return obj
