"""Moving a module to an XLA device, where its parameters become other objects than they were."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fulmen_xla._library import library

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Moves", "created_on_host", "quiet_hooks", "step", "sync"]


def quiet_hooks() -> None:
    """Ignore torch's notice of backward hooks on layers whose inputs need no gradient: torch-xla's shall fire there."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)


def sync() -> None:
    """Cut the recorded graph here and start to run it; nothing waits for its results."""
    library().sync()


def step(optimizer: Optimizer, closure: Callable[[], object] | None) -> object:
    """Step, and cut the graph: a batch and its update are one program, the next one is another."""
    result: Any = optimizer.step() if closure is None else optimizer.step(closure)  # type: ignore[arg-type]
    sync()
    return cast("object", result)


class Moves:
    """Moves modules, and knows which parameter took the place of which: ties and optimizers follow."""

    def __init__(self) -> None:
        self._successors = WeakIdKeyDictionary()

    def move(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Move ``module`` in place and return it. What shared a parameter before shares one after."""
        places = list(_places(module))
        module.to(device)
        first: dict[int, nn.Parameter] = {}
        for owner, name, old in places:
            new = first.setdefault(id(old), cast("nn.Parameter", getattr(owner, name)))
            setattr(owner, name, new)
            if new is not old:
                self._successors[old] = new
        return module

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Let optimizers that were made from a module before it was moved hold the parameters it has now."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self._now(parameter) for parameter in group["params"]]
            state = cast("dict[Tensor, Any]", optimizer.state)
            for old in [one for one in state if self._now(one) is not one]:
                new = self._now(old)
                state[new] = {key: _on(value, old, new) for key, value in state.pop(old).items()}

    def _now(self, parameter: Tensor) -> Tensor:
        successors = cast("dict[Tensor, Tensor]", self._successors)
        while parameter in successors:
            parameter = successors[parameter]
        return parameter


def _places(module: nn.Module) -> Generator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield owner, name, parameter


def _on(value: object, old: Tensor, new: Tensor) -> object:
    """What an optimizer keeps for a parameter, beside that parameter; a count of steps stays on the host."""
    if isinstance(value, torch.Tensor) and value.shape == old.shape and value.dim() > 0:
        return value.to(new.device)
    return value


class _SkipInitialisation(TorchFunctionMode):
    """Turns the functions of ``torch.nn.init`` into identities: a checkpoint will overwrite what they would do."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def created_on_host(*, empty: bool) -> Generator[None]:
    """Within the block modules are made on the host, with the host's random numbers: on every device the same model.

    With ``empty`` the initialisers of ``torch.nn`` do nothing.
    """
    with _SkipInitialisation() if empty else contextlib.nullcontext():
        yield
