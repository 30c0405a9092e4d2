"""A precision plan as a sharding strategy applies it: around the forward pass, and in what travels between ranks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._sharded.layout import map_tensors

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor, nn

    from fulmen_protocols.precision import PrecisionPlan

__all__ = ["Casting"]

_USABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SINGLE: PrecisionPlan = {
    "parameter": torch.float32,
    "compute": torch.float32,
    "reduction": torch.float32,
    "output": torch.float32,
    "scaler": "none",
}


class Casting:
    """What a precision plan means for a sharded module.

    Mixed precision (parameters in float32, computation in half): autocast around forward, as in one process, so that
    losses and norms stay in float32 where autocast keeps them so. On an accelerator weights are gathered in half
    precision already; on a CPU in float32, since autocast there lets no layer have weights of another dtype than its
    input. True precision: parameters, inputs and new tensors have the one dtype.

    Args:
        plan: what is asked for.
        policy: the user's own for what is gathered and reduced, in place of the plan's.

    Raises:
        MisconfigurationException: a dtype that cannot be sharded and computed in.
    """

    def __init__(self, plan: PrecisionPlan | None = None, policy: MixedPrecisionPolicy | None = None) -> None:
        self.plan = plan = _SINGLE if plan is None else plan
        self._policy = policy
        for role in ("parameter", "compute", "reduction"):
            if plan[role] not in _USABLE:
                raise MisconfigurationException(
                    f"FSDPStrategy cannot apply a precision whose {role} dtype is {plan[role]}: it shards, computes "
                    f"and reduces in {', '.join(str(dtype).removeprefix('torch.') for dtype in _USABLE)}. Choose a "
                    "'-mixed' or '-true' precision of those."
                )
        self.is_mixed = plan["parameter"] != plan["compute"]

    def policy(self, device: torch.device, *, is_root: bool) -> MixedPrecisionPolicy:
        """What ``fully_shard`` is told, for the whole model or for a unit inside."""
        if self._policy is not None:
            return self._policy
        plan = self.plan
        if self.is_mixed and device.type != "cpu":
            # A step is given whole batches, targets among them, whose digits must not be lost: the root casts none.
            return MixedPrecisionPolicy(plan["compute"], plan["reduction"], cast_forward_inputs=not is_root)
        reduction = None if plan["reduction"] == plan["parameter"] else plan["reduction"]
        return MixedPrecisionPolicy(None, reduction, cast_forward_inputs=False)

    def gathers_in_half(self, device: torch.device) -> bool:
        """Whether layers see weights of another dtype than the stored ones."""
        dtype = self.policy(device, is_root=True).param_dtype
        return dtype is not None and dtype != self.plan["parameter"]

    def store(self, module: nn.Module) -> nn.Module:
        """Cast parameters and floating-point buffers to the plan's dtype, in place; float32 leaves them as they are."""
        dtype = self.plan["parameter"]
        return module if dtype == torch.float32 else module.to(dtype)

    def inputs(self, values: Any) -> Any:
        """Arguments of a forward pass: true precision casts them."""
        dtype = self.plan["parameter"]
        return values if dtype == torch.float32 else map_tensors(lambda tensor: _cast(tensor, dtype), values)

    def output(self, value: object) -> Any:
        """What a plain ``forward`` hands back: floating-point tensors in the plan's output dtype."""
        if self.plan["compute"] == torch.float32:
            return value
        return map_tensors(lambda tensor: _cast(tensor, self.plan["output"]), value)

    @contextlib.contextmanager
    def forward(self, device_type: str) -> Generator[None]:
        """Surrounds one forward pass."""
        plan = self.plan
        if self.is_mixed:
            with torch.autocast(device_type, dtype=plan["compute"]):
                yield
        elif plan["parameter"] != torch.float32:
            before = torch.get_default_dtype()
            torch.set_default_dtype(plan["parameter"])
            try:
                yield
            finally:
                torch.set_default_dtype(before)
        else:
            yield


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
