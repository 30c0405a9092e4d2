"""A real fit whose memory is measured: bytes of what each rank holds, and on a GPU the allocator's peak in a step.

Run as ``python memory_script.py '{"strategy": ..., "report": PATH, ...}'``; rank 0 writes the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import fulmen


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        q, k, v = (one(y).view(batch, length, -1, self.size).transpose(1, 2) for one in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, -1)), 0.1, self.training)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]  # torch says Any of it


class Model(fulmen.LightningModule):
    """A language model; with ``tensor_parallel`` it places itself on the mesh."""

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        vocabulary: int = 128,
        places: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        self.places, self.fused = places, fused
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def configure_model(self) -> None:
        """Tensor parallel blocks, each sharded, on a mesh of two dimensions."""
        if not self.places:
            return
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh: Any = self.device_mesh
        wide, narrow = ColwiseParallel, RowwiseParallel
        plan: Any = {"q": wide(), "k": wide(), "v": wide(), "out": narrow(), "up": wide(), "down": narrow()}
        for block in self.blocks:
            parallelize_module(block, mesh["tensor_parallel"], plan)
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self, mesh=mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross entropy of the next token."""
        logits = self.head(self.blocks(self.tokens(batch[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        """AdamW as it comes."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused)


def strategy_of(asked: dict[str, Any]) -> Any:
    """The strategy object that the request names."""
    if asked["strategy"] == "fsdp":
        return fulmen.strategies.FSDPStrategy(auto_wrap_policy={Block})
    if asked["strategy"] == "model_parallel":
        return fulmen.strategies.ModelParallelStrategy(data_parallel_size=asked["devices"] // 2, tensor_parallel_size=2)
    return asked["strategy"]


def trainer_of(asked: dict[str, Any], accelerator: str, **more: Any) -> fulmen.Trainer:
    """The Trainer of a request, on ``accelerator``."""
    return fulmen.Trainer(
        accelerator=accelerator,
        devices=asked["devices"],
        strategy=strategy_of(asked),
        precision=asked.get("precision"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


def local_bytes(tensors: Any) -> int:
    """Bytes of this rank's parts."""
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


class Measuring:
    """Reads the allocator's peak from the third step on, and at the end what the rank holds."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """In the third step the optimizer's state and every buffer are there."""
        if batch_idx == 2 and pl_module.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are whole now."""
        self.found["gradients"] = local_bytes(p.grad for p in pl_module.parameters() if p.grad is not None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Weights, optimizer state, peak."""
        self.found["parameters"] = local_bytes(pl_module.parameters())
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.found["optimizer"] = local_bytes(value for value in states if isinstance(value, Tensor))
        if pl_module.device.type == "cuda":
            self.found["peak"] = torch.cuda.max_memory_allocated()


def main(asked: dict[str, Any]) -> None:
    """Fit for five batches and report."""
    measuring = Measuring()
    batches = [torch.randint(0, asked["model"]["vocabulary"], tuple(asked["batch"])) for _ in range(5)]
    runs = trainer_of(asked, asked["accelerator"], callbacks=[measuring])
    runs.fit(Model(**asked["model"]), batches)
    if runs.global_rank == 0:
        Path(asked["report"]).write_text(json.dumps(measuring.found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
