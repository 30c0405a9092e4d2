"""What XLA devices cannot do, told by the name of the strategy that was asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fulmen_protocols.errors import MisconfigurationException
from fulmen_xla.precision import XLAPrecision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_protocols.precision import Precision, PrecisionPlan

__all__ = ["check_devices", "check_plan", "own_precision"]

_PRECISIONS = ("32-true", "16-true", "bf16-true")


def own_precision(strategy: str, name: str) -> Precision:
    """``XLAPrecision`` of that name.

    Raises:
        MisconfigurationException: there is none.
    """
    if name not in _PRECISIONS:
        raise MisconfigurationException(
            f"precision={name!r} with strategy {strategy}: XLA devices train in {', '.join(map(repr, _PRECISIONS))}. "
            "'bf16-true' is what TPUs are made for."
        )
    allowed: Any = name
    return XLAPrecision(allowed)


def check_plan(strategy: str, plan: PrecisionPlan) -> None:
    """Refuse a precision that scales losses, or whose dtypes an XLA device has not.

    Raises:
        MisconfigurationException: it is one.
    """
    if plan["scaler"] != "none" or torch.float64 in (plan["parameter"], plan["compute"]):
        what = "scales losses" if plan["scaler"] != "none" else "computes in float64"
        raise MisconfigurationException(
            f"strategy {strategy} got a precision that {what}, which XLA devices cannot. "
            f"Use precision={' or '.join(map(repr, _PRECISIONS))}."
        )


def check_devices(strategy: str, devices: Sequence[torch.device]) -> None:
    """Refuse devices of another kind.

    Raises:
        MisconfigurationException: there is one.
    """
    strange = [str(device) for device in devices if device.type != "xla"]
    if strange:
        raise MisconfigurationException(
            f"strategy {strategy} drives XLA devices, but the run has {', '.join(strange)}. "
            f"Pass accelerator='tpu' (or 'xla': whatever PJRT_DEVICE names), or another strategy."
        )
