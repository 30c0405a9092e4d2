"""Whether an artifact computes what the module does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fulmen_protocols.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fulmen_export._eager import Eager
    from fulmen_export._inputs import Inputs

__all__ = ["agree"]

# What one rounding of a sum leaves: the tolerances that torch.testing has for these types.
_COARSE = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


def agree(
    what: str,
    eager: Eager,
    run: Callable[[Inputs], Sequence[Tensor]],
    samples: Sequence[Inputs | None],
    tolerance: float,
) -> None:
    """Compare the artifact with the module on every sample that is not None.

    A value may differ by ``tolerance`` times the largest magnitude in its tensor, or times 1 if that is smaller;
    integers and booleans may not.

    Raises:
        ExportError: they differ, or the artifact does not run.
    """
    name = type(eager.module).__name__
    for sample in samples:
        if sample is None:
            continue
        expected = eager.outputs(sample)
        try:
            got = run(sample.copied())
        # A runtime of somebody else's may raise anything.
        except Exception as error:
            raise ExportError(
                f"{what}: the artifact of {name} does not run on inputs of {sample.shapes()}: "
                f"{type(error).__name__}: {_first_line(error)}. Nothing was written; verify=False writes it unchecked."
            ) from error
        problem = _difference(expected, got, tolerance)
        if problem:
            raise ExportError(
                f"{what}: the artifact of {name} computes something else than forward on inputs of {sample.shapes()}: "
                f"{problem}. Nothing was written. A forward that draws random numbers, or depends on Python values "
                "that change between calls, cannot be exported; tolerance= and verify=False change the check."
            )


def _difference(expected: Sequence[Tensor], got: Sequence[Tensor], tolerance: float) -> str | None:
    if len(expected) != len(got):
        return f"it returns {len(got)} tensors, forward {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(expected, got, strict=True)):
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return (
                f"output {index} is {theirs.dtype} of {tuple(theirs.shape)}, forward's {ours.dtype} of "
                f"{tuple(ours.shape)}"
            )
        off, allowed = _distance(ours, theirs.to(ours.device), tolerance)
        if off > allowed:
            return f"output {index} differs by {off:.3g}, allowed is {allowed:.3g}"
    return None


def _distance(ours: Tensor, theirs: Tensor, tolerance: float) -> tuple[float, float]:
    """The largest difference, and the largest that is allowed. NaN equals NaN; infinities must be equal."""
    if not (ours.is_floating_point() or ours.is_complex()):
        wrong = int((ours != theirs).sum())
        return float(wrong), 0.0
    wide = torch.complex128 if ours.is_complex() else torch.float64
    # MPS has no float64; a check reads the values on the host anyway.
    one, other = ours.detach().cpu().to(wide), theirs.detach().cpu().to(wide)
    same = (one == other) | (one.isnan() & other.isnan())
    if bool(same.all()):
        return 0.0, tolerance
    if not bool((one.isfinite() & other.isfinite() | same).all()):
        return float("inf"), tolerance
    finite = one[one.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    off = float((one - other)[~same].abs().max())
    return off, max(tolerance, _COARSE.get(ours.dtype, 0.0)) * scale


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
