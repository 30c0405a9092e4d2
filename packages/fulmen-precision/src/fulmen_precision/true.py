"""True precision: parameters, activations and gradients all in one dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from fulmen_precision._default_dtype import DefaultDtype
from fulmen_precision._tensors import cast_floating
from fulmen_protocols import MisconfigurationException, PrecisionPlan, did_you_mean

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

__all__ = ["DoublePrecision", "FullPrecision", "HalfPrecision", "bfloat16", "double", "half", "single"]

_HALVES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class FullPrecision:
    """``"32-true"``: whatever PyTorch does by itself. Offers no ability, so it costs nothing on the path of a batch."""

    precision: str = "32-true"

    def plan(self) -> PrecisionPlan:
        """float32 throughout."""
        return _plan(torch.float32)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` as it is: a part that was made in another dtype on purpose stays in it."""
        return module

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new parameters and floating tensors are float32."""
        return DefaultDtype(torch.float32)


class _Cast:
    """What half and double precision share: module, default dtype, inputs and outputs are cast."""

    precision: str
    _dtype: torch.dtype

    def plan(self) -> PrecisionPlan:
        """One dtype throughout; outputs are handed back in torch's default dtype of that moment."""
        return _plan(self._dtype)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast every floating-point parameter and buffer of ``module`` in place and return it."""
        return module.to(self._dtype)

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new parameters and floating tensors get this precision's dtype."""
        return DefaultDtype(self._dtype)

    def forward_context(self) -> AbstractContextManager[object]:
        """A context in which floating tensors that ``forward`` makes get this precision's dtype."""
        return DefaultDtype(self._dtype)

    def convert_input(self, data: object) -> object:
        """``data`` with its floating tensors cast; targets too, so that a loss meets equal dtypes."""
        return cast_floating(data, self._dtype)

    def convert_output(self, data: object) -> object:
        """``data`` with its floating tensors cast to ``torch.get_default_dtype()``."""
        return cast_floating(data, torch.get_default_dtype())


class HalfPrecision(_Cast):
    """``"16-true"`` (float16) or ``"bf16-true"`` (bfloat16): half the memory, no full-precision copy of the weights.

    Small updates vanish when they are below the resolution of the dtype (about 3 digits for bfloat16); prefer mixed
    precision where memory allows.

    Args:
        precision: which of the two.

    Raises:
        ValueError: ``precision`` is neither.
    """

    def __init__(self, precision: Literal["16-true", "bf16-true"] = "16-true") -> None:
        if precision not in _HALVES:
            raise MisconfigurationException(
                f"HalfPrecision got precision={precision!r}.{did_you_mean(str(precision), _HALVES)} "
                f"Allowed: {', '.join(map(repr, _HALVES))}."
            )
        self.precision = precision
        self._dtype = _HALVES[precision]


class DoublePrecision(_Cast):
    """``"64-true"``: float64 throughout."""

    def __init__(self) -> None:
        self.precision = "64-true"
        self._dtype = torch.float64


def single(*, device: str = "cpu") -> FullPrecision:
    """Make the precision registered as ``"32-true"``; the same on every device."""
    return FullPrecision()


def double(*, device: str = "cpu") -> DoublePrecision:
    """Make the precision registered as ``"64-true"``.

    Raises:
        ValueError: ``device`` is ``"mps"``, which has no float64.
    """
    if torch.device(device).type == "mps":
        raise MisconfigurationException(
            f"precision '64-true' on device {device!r}: MPS has no float64. Use '32-true' or another device."
        )
    return DoublePrecision()


def half(*, device: str = "cpu") -> HalfPrecision:
    """Make the precision registered as ``"16-true"``; the same on every device."""
    return HalfPrecision("16-true")


def bfloat16(*, device: str = "cpu") -> HalfPrecision:
    """Make the precision registered as ``"bf16-true"``; the same on every device."""
    return HalfPrecision("bf16-true")


def _plan(dtype: torch.dtype) -> PrecisionPlan:
    # Full precision never touches what forward returns; the others hand back torch's default dtype.
    output = dtype if dtype is torch.float32 else torch.get_default_dtype()
    return PrecisionPlan(parameter=dtype, compute=dtype, reduction=dtype, output=output, scaler="none")
