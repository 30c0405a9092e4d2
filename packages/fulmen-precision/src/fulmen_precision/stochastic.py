"""Stochastic rounding: bfloat16 weights that do not lose small updates."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from fulmen_precision.true import HalfPrecision
from fulmen_protocols import MisconfigurationException, PrecisionPlan

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["StochasticHalfPrecision", "bfloat16", "round_stochastically", "stochastic_rounding"]

OptimizerT = TypeVar("OptimizerT", bound="Optimizer")


def round_stochastically(values: Tensor) -> Tensor:
    """``values``, float32 of any shape and device, as bfloat16: up or down with a chance proportional to nearness.

    So the expected result is the value itself, and an update of a hundredth of the spacing moves a weight once in a
    hundred steps, where rounding to nearest would never move it. Draws from torch's random state of the device, which
    checkpoints hold. Infinities and NaN stay what they are.

    A bfloat16 is the upper half of a float32: adding 16 random bits to the lower half carries into the upper with just
    that chance (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, section 3).
    """
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def stochastic_rounding(optimizer: OptimizerT) -> OptimizerT:
    """Let ``optimizer`` compute in float32 and round new bfloat16 weights stochastically; returns it.

    Before a step, weights and gradients in bfloat16 become float32, so the optimizer's state is float32 too; after it
    the weights are rounded back into the tensors they were in. During a step this takes 8 more bytes per weight that
    has a gradient. Works with every optimizer of torch, fused and foreach ones included, and within closures; other
    dtypes are left alone.

    Raises:
        ValueError: at the first step: a parameter is sharded (DTensor). Keep float32 shards with mixed precision there.
    """
    widened = _Widened()

    def before(one: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer itself
        if closure is None:
            widened.widen(one)
            return None

        def in_bfloat16() -> object:
            widened.narrow()  # LBFGS evaluates its closure several times, between updates
            loss = closure()
            widened.widen(one)
            return loss

        return (one,), {**kwargs, "closure": in_bfloat16}

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda _one, _args, _kwargs: widened.narrow())
    loading: list[dict[str, Any]] = []
    optimizer.register_load_state_dict_pre_hook(lambda _one, state: loading.append(state))
    optimizer.register_load_state_dict_post_hook(lambda one: _restore_float32(one, loading.pop()))
    return optimizer


class _Widened:
    """The parameters that are float32 at the moment, each with its own bfloat16 tensors."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def widen(self, optimizer: Optimizer) -> None:
        """Give every bfloat16 parameter with a gradient float32 data."""
        for group in optimizer.param_groups:
            for parameter in cast("list[Tensor]", group["params"]):
                gradient = parameter.grad
                if parameter.dtype is not torch.bfloat16 or gradient is None:
                    continue
                if _is_sharded(parameter):
                    raise MisconfigurationException(
                        "stochastic rounding got a sharded parameter (DTensor). With sharded strategies keep float32 "
                        "shards: precision='bf16-mixed' instead of 'bf16-true-stochastic'."
                    )
                self._held.append((parameter, parameter.data, gradient))
                parameter.grad = None  # it must have the parameter's dtype
                parameter.data = parameter.data.float()
                parameter.grad = gradient.float()

    def narrow(self) -> None:
        """Round what ``widen`` has widened, back into its own tensors."""
        for parameter, stored, gradient in self._held:
            wide = parameter.data
            parameter.grad = None
            parameter.data = stored.copy_(round_stochastically(wide))
            parameter.grad = gradient
        self._held.clear()


def _restore_float32(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Undo that torch casts loaded state to the parameters' dtype."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            now = optimizer.state[parameter].get(name)
            if isinstance(now, Tensor) and now.dtype is torch.bfloat16 and value.dtype is torch.float32:
                optimizer.state[parameter][name] = value.to(device=now.device, copy=True)


class StochasticHalfPrecision(HalfPrecision):
    """``"bf16-true-stochastic"``: ``"bf16-true"`` whose optimizers compute in float32 and round stochastically.

    12 bytes per weight with Adam (2 + 2 for weight and gradient, 8 for the state), where ``"bf16-mixed"`` takes 16 and
    ``"bf16-true"`` 8.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")
        self.precision = "bf16-true-stochastic"

    def plan(self) -> PrecisionPlan:
        """bfloat16 throughout, but the state of optimizers in float32."""
        plan = super().plan()
        plan["optimizer_state"] = torch.float32
        return plan

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Let ``optimizer`` round stochastically; see ``stochastic_rounding``."""
        stochastic_rounding(optimizer)


def bfloat16(*, device: str = "cpu") -> StochasticHalfPrecision:
    """Make the precision registered as ``"bf16-true-stochastic"``; the same on every device."""
    return StochasticHalfPrecision()


def _is_sharded(parameter: Tensor) -> bool:
    # Importing it takes a second, and who has sharded anything has done that.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter, tensors.DTensor)
