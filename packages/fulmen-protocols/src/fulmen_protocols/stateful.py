"""Stateful and Steppable: the two shapes that checkpoints and optimizers are known by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Optimizable", "Stateful", "Steppable"]


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and given back."""

    # Any: the argument's type is the object's own business (torch declares dict[str, Any]).
    def state_dict(self) -> dict[str, Any]:
        """The state as plain data and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Restore what ``state_dict`` gave."""
        ...


@runtime_checkable
class Steppable(Protocol):
    """Anything that can take an optimizer step."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update once; ``closure``, if given, evaluates the loss again."""
        ...


@runtime_checkable
class Optimizable(Steppable, Stateful, Protocol):
    """What ``configure_optimizers`` may return besides ``torch.optim.Optimizer``."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    state: Any

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""
        ...
