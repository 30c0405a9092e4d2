"""DeepSpeedPrecision: the precisions that DeepSpeed's engine applies, as an object to give away."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from fulmen_deepspeed._casting import cast_floating, default_dtype
from fulmen_protocols import MisconfigurationException, PrecisionPlan, did_you_mean

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

__all__ = ["DeepSpeedPrecision"]

_DTYPES = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}


class DeepSpeedPrecision:
    """One of the five precisions of DeepSpeed's engine, which does the casting, the scaling and the clipping itself.

    ``Trainer(strategy="deepspeed", precision="bf16-mixed")`` needs no such object. In the 16-bit ones the engine
    computes with 16-bit weights and steps float32 copies of them, which is the same for ``"-mixed"`` and ``"-true"``;
    the names differ in the dtype in which modules are made and weights are saved.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.

    Raises:
        ValueError: another one.
    """

    def __init__(self, precision: str) -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"DeepSpeedPrecision got precision={precision!r}.{did_you_mean(str(precision), _DTYPES)} "
                f"Allowed: {', '.join(map(repr, _DTYPES))}."
            )
        self.precision = precision
        self._dtype = _DTYPES[precision]
        self._stored = self._dtype if precision.endswith("-true") else torch.float32

    def plan(self) -> PrecisionPlan:
        """What the engine does: weights, computation and reduction in the dtype, the step in float32."""
        return PrecisionPlan(
            parameter=self._stored,
            compute=self._dtype,
            reduction=self._dtype,
            output=torch.get_default_dtype(),
            scaler="dynamic" if self._dtype is torch.float16 else "none",
            optimizer_state=torch.float32,
        )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast to the dtype in place for a ``"-true"`` precision; otherwise the engine does it when it is made."""
        return module.to(self._dtype) if self.precision.endswith("-true") else module

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new floating tensors get the dtype of a ``"-true"`` precision."""
        return default_dtype(self._dtype) if self.precision.endswith("-true") else nullcontext()

    def convert_input(self, data: object) -> object:
        """``data`` with its floating tensors in the dtype of computation."""
        return cast_floating(data, self._dtype)
