"""Parameters that sharding has replaced, for optimizers that were made from the old ones."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, cast

from fulmen_strategies._sharded.layout import laid_out_like, map_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Replaced"]


class Replaced:
    """Remembers parameters as they were before their module was sharded, and keeps none of them alive."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[nn.Parameter], weakref.ref[nn.Module], str]] = []

    def remember(self, module: nn.Module) -> None:
        """Called with a module that is about to be sharded."""
        owner = weakref.ref(module)
        self._known += [(weakref.ref(parameter), owner, name) for name, parameter in module.named_parameters()]

    def forget(self) -> None:
        """All of them."""
        self._known.clear()

    def hand_over(self, optimizer: Optimizer) -> None:
        """Let ``optimizer`` step the sharded parameters; its state is sharded alike."""
        current: dict[int, nn.Parameter] = {}
        for old_ref, owner_ref, name in self._known:
            old, owner = old_ref(), owner_ref()
            if old is not None and owner is not None:
                current[id(old)] = owner.get_parameter(name)
        for group in optimizer.param_groups:
            for index, parameter in enumerate(cast("list[Tensor]", group["params"])):
                new = current.get(id(parameter))
                if new is not None and new is not parameter:
                    group["params"][index] = new
                    if parameter in optimizer.state:
                        optimizer.state[new] = _sharded_like(new, optimizer.state.pop(parameter))


def _sharded_like(parameter: nn.Parameter, state: object) -> object:
    def fitted(value: Tensor) -> Tensor:
        return laid_out_like(value, parameter) if value.shape == parameter.shape and value.dim() else value

    return cast("object", map_tensors(fitted, state))
