"""Norms, clipping and checks of gradients of which each rank holds a part, on meshes of any shape.

The results are those of one process that holds the whole gradients: each part counts once, whether it is sharded or
replicated along an axis, and every rank gets the same number. Nothing is read by the host unless that is asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._sharded.layout import local

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

__all__ = ["clip_by_norm", "clip_by_value", "parameters_of", "total_norm"]


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that ``optimizer`` steps, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients as one vector, shape ``()``, a plain float32 (or float64) tensor, equal on every rank.

    Args:
        gradients: DTensors and plain tensors in any mixture; plain ones count as replicated.
        norm_type: any number above 0, or ``inf``.

    Raises:
        MisconfigurationException: ``norm_type`` is not above 0.
    """
    if not norm_type > 0:
        raise MisconfigurationException(
            f"norm_type={norm_type!r} of a sharded gradient: give a number above 0, or inf."
        )
    groups = _by_layout(gradients)
    if not groups:
        return torch.tensor(0.0)
    parts = [_norm_of_layout(mesh, axes, tensors, norm_type) for (mesh, axes), tensors in groups.items()]
    device = parts[0].device
    joined = torch.stack([part.to(device) for part in parts])
    return cast("Tensor", torch.linalg.vector_norm(joined, norm_type)) if len(parts) > 1 else joined[0]


def _norm_of_layout(mesh: DeviceMesh | None, axes: tuple[int, ...], parts: list[Tensor], norm_type: float) -> Tensor:
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    norms = _norms(parts, norm_type, dtype)
    device = norms.device
    norm = cast("Tensor", torch.linalg.vector_norm(norms, norm_type))
    if mesh is None or not axes:
        return norm
    on_mesh = norm.to(mesh.device_type)
    if math.isinf(norm_type):
        # A maximum over ranks may lose a NaN, depending on the backend; the second number brings it along.
        pair = torch.stack([on_mesh.nan_to_num(0.0, posinf=math.inf), on_mesh.isnan().to(dtype)])
        for axis in axes:
            dist.all_reduce(pair, dist.ReduceOp.MAX, mesh.get_group(axis))
        on_mesh = torch.where(pair[1] > 0, math.nan, pair[0])
    else:
        power = on_mesh**norm_type
        for axis in axes:
            dist.all_reduce(power, dist.ReduceOp.SUM, mesh.get_group(axis))
        on_mesh = power ** (1.0 / norm_type)
    return on_mesh.to(device)


def _norms(parts: list[Tensor], norm_type: float, dtype: torch.dtype) -> Tensor:
    """The norm of each part, on one device; of an empty one, which a small parameter leaves on some ranks, 0."""
    device = parts[0].device
    full = [part for part in parts if part.numel()]
    if not full:
        return torch.zeros(1, dtype=dtype, device=device)
    norms = torch._foreach_norm(full, norm_type, dtype)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    return torch.stack([each.to(device) for each in norms])


@torch.no_grad()
def clip_by_norm(
    parameters: Sequence[Tensor], max_norm: float, *, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients of ``parameters`` in place so that their joint norm is at most ``max_norm``.

    Args:
        parameters: read for ``.grad``; those without one are skipped.
        max_norm: in the units of the unscaled gradient.
        norm_type: which norm.
        error_if_nonfinite: fail where the norm is infinite or NaN, on every rank alike; the host waits for the device.

    Returns:
        The norm before clipping, shape ``()``, equal on every rank.

    Raises:
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
    """
    gradients = _gradients(parameters)
    norm = total_norm(gradients, norm_type)
    # One synchronisation, which the caller has asked for.
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {norm.item()}, so they cannot be clipped to "
            f"{max_norm}. Look for what made them non-finite, or pass error_if_nonfinite=False."
        )
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for device, parts in _by_device(gradients).items():
        torch._foreach_mul_(parts, factor.to(device))  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    return norm


@torch.no_grad()
def clip_by_value(parameters: Sequence[Tensor], clip_value: float) -> None:
    """Clamp every element of the gradients of ``parameters`` to ``[-clip_value, clip_value]`` in place."""
    bound = float(clip_value)
    for parts in _by_device(_gradients(parameters)).values():
        torch._foreach_clamp_min_(parts, -bound)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        torch._foreach_clamp_max_(parts, bound)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients there are. One that is still a sum over ranks waiting to be taken is summed, and kept so."""
    found: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if isinstance(parameter.grad, DTensor) and _is_pending(parameter.grad):
            parameter.grad = _summed(parameter.grad)
        found.append(parameter.grad)
    return found


def _is_pending(gradient: DTensor) -> bool:
    return any(isinstance(placement, Partial) for placement in gradient.placements)


def _summed(gradient: DTensor) -> DTensor:
    wanted = [Replicate() if isinstance(one, Partial) else one for one in gradient.placements]
    return gradient.redistribute(placements=wanted)


def _by_layout(gradients: Iterable[Tensor]) -> dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]]:
    """This rank's parts by mesh and by the mesh's axes along which they differ, in the same order on every rank."""
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            one = _summed(gradient) if _is_pending(gradient) else gradient
            axes = tuple(axis for axis, place in enumerate(one.placements) if not isinstance(place, Replicate))
            groups.setdefault((one.device_mesh, axes), []).append(local(one))
        else:
            groups.setdefault((None, ()), []).append(gradient)
    return groups


def _by_device(gradients: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        part = local(gradient)
        groups.setdefault(part.device, []).append(part)
    return groups
