"""The workload "1b" of gpu_overhead: a 1B-parameter transformer, its blocks compiled, under FSDP2 in bfloat16.

The raw loop is what a person writes with ``fully_shard``. fulmen runs with the same policy for what is gathered and
reduced, and as ``fulmen-mixed`` with ``precision="bf16-mixed"``, which adds autocast; Lightning has FSDP1 and autocast.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tools.bench.transformer import SHAPES, Transformer, TransformerBlock, flops_per_token

if TYPE_CHECKING:
    from torch import Tensor

BATCH = {"1b": 4, "tiny": 2}
"""Sequences for each device and step."""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, of the SXM boards' data sheets."""


def network(size: str) -> nn.Module:
    """The model, each block compiled; the hooks of what shards it stay outside."""
    model = Transformer(size)
    for block in model.blocks:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    return model


def tokens(size: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """One batch, on ``device``: inputs and what comes next."""
    shape = SHAPES[size]
    make = torch.Generator(device).manual_seed(0)
    drawn = torch.randint(0, shape.vocabulary, (BATCH[size], shape.context + 1), device=device, generator=make)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def policy() -> MixedPrecisionPolicy:
    """Weights are gathered in bfloat16, gradients reduced in float32."""
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def sharded(size: str, device: torch.device) -> nn.Module:
    """The model of the raw loop."""
    model = network(size).to(device)
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mp_policy=policy())  # type: ignore[arg-type]
    return fully_shard(model, mp_policy=policy())


def options(library: str, kind: str) -> dict[str, Any]:
    """Strategy and precision of a Trainer."""
    if library == "lightning.pytorch":
        strategies: Any = importlib.import_module("lightning.pytorch.strategies")
        return {"strategy": strategies.FSDPStrategy(auto_wrap_policy={TransformerBlock}), "precision": "bf16-mixed"}
    strategies = importlib.import_module("fulmen.strategies")
    if kind == "mixed":
        return {"strategy": strategies.FSDPStrategy(auto_wrap_policy={TransformerBlock}), "precision": "bf16-mixed"}
    strategy = strategies.FSDPStrategy(auto_wrap_policy={TransformerBlock}, mixed_precision=policy())
    return {"strategy": strategy, "precision": "32-true"}


def rates(size: str, us: float, device_name: str) -> tuple[float, float | None]:
    """Tokens a second of one device, and the part of its peak that they take; None for an unknown device."""
    a_second = BATCH[size] * SHAPES[size].context / (us * 1e-6)
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device_name), None)
    used = flops_per_token(size, SHAPES[size].context) * a_second
    return a_second, None if peak is None else used / peak


class Syncs:
    """Counts synchronisations of host and device within training batches, from batch ``first`` on."""

    def __init__(self, first: int, accelerator: str) -> None:
        self.first, self.count = first, 0
        self._counts = accelerator == "cuda"
        self._show = warnings.showwarning

    def begin(self, index: int) -> None:
        """A batch starts."""
        if self._counts and index >= self.first:
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation.*")
            warnings.showwarning = self._seen
            torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> None:
        """The batch has been trained; what is declared may follow."""
        if self._counts:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self._show

    def _seen(self, message: Any, *_: Any, **__: Any) -> None:
        self.count += "synchronizing CUDA operation" in str(message)
