"""Dtypes around a forward pass: of what goes in, of what is made inside, of what comes out."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fulmen_protocols.nested import map_instances

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from fulmen_protocols.precision import PrecisionPlan

__all__ = ["SINGLE", "Casting", "cast_floating", "default_dtype"]

SINGLE: PrecisionPlan = {
    "parameter": torch.float32,
    "compute": torch.float32,
    "reduction": torch.float32,
    "output": torch.float32,
    "scaler": "none",
}
"""Full precision."""


def cast_floating(data: object, dtype: torch.dtype) -> object:
    """``data`` with every real floating tensor in ``dtype``; collections are entered as by ``map_instances``."""
    return map_instances(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, data)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    """Within the block ``torch.get_default_dtype()`` is ``dtype``; afterwards what it was at entry."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Casting:
    """What a plan means for calls of a module.

    Under the engine weights have the dtype of computation, so floating inputs get it too; losses are computed in it as
    well. Without an engine, in evaluation, a mixed plan is autocast over weights that stay as they are.
    """

    def __init__(self, plan: PrecisionPlan) -> None:
        self.plan = plan
        self.is_single = plan["compute"] == torch.float32

    def inputs(self, values: object) -> object:
        """Arguments of a call, floating tensors in the dtype of computation."""
        return values if self.is_single else cast_floating(values, self.plan["compute"])

    def output(self, value: object) -> object:
        """What a plain forward hands back, floating tensors in the plan's output dtype."""
        return value if self.is_single else cast_floating(value, self.plan["output"])

    def evaluation(self, device_type: str) -> AbstractContextManager[object]:
        """Surrounds a call without an engine."""
        plan = self.plan
        if plan["parameter"] != plan["compute"]:
            return torch.autocast(device_type, dtype=plan["compute"])
        return nullcontext() if self.is_single else default_dtype(plan["compute"])
