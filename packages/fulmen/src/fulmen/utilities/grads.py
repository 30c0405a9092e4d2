"""Norms of gradients, for logging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["grad_norm"]

# Untyped in torch's stubs.
_vector_norm = cast("Callable[[Tensor, float], Tensor]", torch.linalg.vector_norm)


def grad_norm(module: nn.Module, norm_type: float | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The p-norm of each parameter's gradient, and of all of them together, ready for ``self.log_dict``.

    Call it in ``on_before_optimizer_step``, where gradients are unscaled. Nothing is read from the device; where
    gradients are sharded over ranks each norm is a collective that every rank must take part in.

    Args:
        module: its parameters that have a gradient are looked at.
        norm_type: p, or ``"inf"`` for the largest absolute value.
        group_separator: between the first part of a key and the parameter's name.

    Returns:
        ``grad_{p}_norm/{name}`` for each parameter and ``grad_{p}_norm_total``, tensors of shape ``()``, where p is
        written as a float; empty when there is no gradient.

    Raises:
        ValueError: ``norm_type`` is no positive number.
    """
    try:
        p = float(norm_type)
    except ValueError:
        p = -1.0
    if not p > 0:
        raise MisconfigurationException(f"norm_type={norm_type!r} must be a positive number or 'inf'.")
    norms = {
        f"grad_{p}_norm{group_separator}{name}": _norm(parameter.grad, p)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        first = next(iter(norms.values()))
        together = torch.stack([norm.to(first.device, first.dtype, non_blocking=True) for norm in norms.values()])
        norms[f"grad_{p}_norm_total"] = _vector_norm(together, p)
    return norms


def _norm(gradient: Tensor, p: float) -> Tensor:
    values = gradient.detach()
    if values.is_sparse:
        values = cast("Tensor", cast("Any", values.coalesce()).values())
    norm = _vector_norm(values, p)
    whole = cast("Callable[[], Tensor] | None", getattr(norm, "full_tensor", None))  # a DTensor is this rank's part
    return norm if whole is None else whole()
