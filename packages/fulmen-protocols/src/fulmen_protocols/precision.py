"""Precision: in which dtypes parameters live, a step computes, gradients are reduced and outputs are handed back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = [
    "Precision",
    "PrecisionPlan",
    "SupportsDeviceCheck",
    "SupportsForwardContext",
    "SupportsGradScaling",
    "SupportsInputConversion",
    "SupportsLayerReplacement",
    "SupportsOptimizerPreparation",
    "SupportsOutputConversion",
]


class PrecisionPlan(TypedDict):
    """The value type at which strategy and precision meet: a plain dict, so that vendors need no import of ours."""

    parameter: torch.dtype
    """dtype in which parameters are stored; optimizer state too, unless ``optimizer_state`` says otherwise."""
    compute: torch.dtype
    """dtype in which matrix products run."""
    reduction: torch.dtype
    """dtype in which gradients are summed over ranks."""
    output: torch.dtype
    """dtype of what ``forward`` hands back."""
    scaler: Literal["none", "dynamic"]
    """Whether losses must be scaled because gradients could underflow in ``compute``."""
    optimizer_state: NotRequired[torch.dtype]
    """dtype of the optimizers' state where it is not that of the parameters."""


@runtime_checkable
class Precision(Protocol):
    """How numbers are stored and computed. Knows nothing about ranks, devices' placement or files.

    Anything beyond these three methods is a ``Supports...`` ability; what a precision does not offer costs nothing
    on the path of a batch.
    """

    def plan(self) -> PrecisionPlan:
        """The dtypes of this precision."""
        ...

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` with parameters in the plan's dtype (the same object where possible)."""
        ...

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new parameters and floating tensors get the plan's parameter dtype."""
        ...


@runtime_checkable
class SupportsDeviceCheck(Protocol):
    """A precision that works on some kinds of device only, or was made for one of them."""

    def check_device(self, kind: str) -> None:
        """Refuse a run on devices of ``kind`` (``torch.device.type``) before anything is started.

        Raises:
            ValueError, ImportError: it would not compute as it says there; the message says where it does.
        """
        ...


@runtime_checkable
class SupportsForwardContext(Protocol):
    """A precision under whose context every forward pass must run (autocast, default dtype)."""

    def forward_context(self) -> AbstractContextManager[object]:
        """A new context for one forward pass and loss; left before ``backward``."""
        ...


@runtime_checkable
class SupportsInputConversion(Protocol):
    """A precision that casts the floating-point tensors of a batch."""

    def convert_input(self, data: object) -> object:
        """``data`` with floating tensors cast, nested collections included; other leaves are left alone."""
        ...


@runtime_checkable
class SupportsOutputConversion(Protocol):
    """A precision that casts what ``forward`` returns. Only Fabric applies it, as a raw loop expects full precision."""

    def convert_output(self, data: object) -> object:
        """``data`` with floating tensors cast to the plan's output dtype."""
        ...


@runtime_checkable
class SupportsOptimizerPreparation(Protocol):
    """A precision with a part in every optimizer's step (rounding, wider state)."""

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Prepare ``optimizer`` in place, once, before its first step and before its state is loaded."""
        ...


@runtime_checkable
class SupportsLayerReplacement(Protocol):
    """A precision that puts layers of its own in the place of a module's (float8, quantized weights).

    Called instead of ``convert_module`` where the strategy applies the plan and casts by itself.
    """

    def replace_layers(self, module: nn.Module) -> nn.Module:
        """Return ``module`` with the layers replaced, in place where possible; no dtype of a parameter changes."""
        ...


@runtime_checkable
class SupportsGradScaling(Protocol):
    """A precision whose loss is scaled before backward and whose gradients are unscaled before clipping.

    Order in a step: ``scale`` → backward → ``unscale`` → clipping and hooks → ``step`` → ``update``. ``step`` skips the
    optimizer when a gradient is not finite.
    """

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the current factor."""
        ...

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of ``optimizer`` by the factor, in place. At most once between two ``step`` calls."""
        ...

    def step(self, optimizer: Optimizer) -> object:
        """Step ``optimizer`` unless a gradient is not finite; unscales first when ``unscale`` was not called."""
        ...

    def update(self) -> None:
        """Adapt the factor after all optimizers of this update have stepped."""
        ...

    def state_dict(self) -> dict[str, object]:
        """The scaler's state as plain data."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore what ``state_dict`` gave."""
        ...
