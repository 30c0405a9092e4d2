"""Casting the floating-point tensors of nested collections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fulmen_protocols.nested import map_instances

if TYPE_CHECKING:
    import torch

__all__ = ["cast_floating"]


def cast_floating(data: object, dtype: torch.dtype) -> object:
    """``data`` with every real floating-point tensor in ``dtype``; collections are entered as by ``map_instances``."""
    return map_instances(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, data)
