"""XLAPrecision: one dtype throughout, on XLA devices."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fulmen_protocols.errors import MisconfigurationException, did_you_mean
from fulmen_protocols.nested import map_instances
from fulmen_protocols.precision import PrecisionPlan
from fulmen_xla._library import require

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from torch import nn

__all__ = ["XLAPrecision"]

_DTYPES = {"32-true": torch.float32, "16-true": torch.float16, "bf16-true": torch.bfloat16}


class XLAPrecision:
    """Full (``"32-true"``) or half precision (``"16-true"``, ``"bf16-true"``): parameters, activations, gradients.

    The module and the floating tensors of a batch are cast. torch-xla's variables that did so behind torch's back
    (XLA_USE_BF16, XLA_USE_F16) are not set: it has dropped them, and asks for models in the dtype they shall have.

    Args:
        precision: which of the three.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
        ValueError: another precision.
    """

    def __init__(self, precision: Literal["32-true", "16-true", "bf16-true"] = "32-true") -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"precision={precision!r} is not for XLA devices.{did_you_mean(str(precision), _DTYPES)} "
                f"Allowed: {', '.join(map(repr, _DTYPES))}."
            )
        require(f"XLAPrecision({precision!r})")
        self.precision: str = precision
        self._dtype = _DTYPES[precision]

    def plan(self) -> PrecisionPlan:
        """One dtype throughout; outputs are handed back in torch's default dtype of that moment."""
        dtype = self._dtype
        output = dtype if dtype is torch.float32 else torch.get_default_dtype()
        return PrecisionPlan(parameter=dtype, compute=dtype, reduction=dtype, output=output, scaler="none")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast floating-point parameters and buffers in place; with ``"32-true"`` leave everything as it is."""
        return module if self._dtype is torch.float32 else module.to(self._dtype)

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new parameters and floating tensors get this precision's dtype."""
        return _default_dtype(self._dtype)

    def forward_context(self) -> AbstractContextManager[object]:
        """A context in which floating tensors that ``forward`` makes get this precision's dtype."""
        return _default_dtype(self._dtype)

    def convert_input(self, data: object) -> object:
        """``data`` with its floating tensors cast."""
        return _cast_floating(data, self._dtype)

    def convert_output(self, data: object) -> object:
        """``data`` with its floating tensors cast to torch's default dtype, with ``"32-true"`` to float32."""
        return _cast_floating(data, self.plan()["output"])


def _cast_floating(data: object, dtype: torch.dtype) -> object:
    return map_instances(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, data)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
