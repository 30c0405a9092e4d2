"""Attention over a sequence that two GPUs share, against one that has it whole. ``torchrun`` or the launcher starts it.

``python context_parallel_script.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.strategies import ModelParallelStrategy

BATCH, LENGTH, WIDTH, HEADS = 2, 64, 64, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def start_weights() -> dict[str, Tensor]:
    """The same on every device: a GPU draws other numbers from the same seed."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        return Attention().state_dict()


class Model(fulmen.LightningModule):
    """As the guide shows it."""

    def configure_model(self) -> None:
        self.net = Attention()
        self.net.load_state_dict(start_weights())
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["context_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[0], batch[1]
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Parallel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch[0], batch[1]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        # Backward runs inside as well: it sends keys and values around once more.
        with context_parallel(self.device_mesh["context_parallel"], buffers=[x, y], buffer_seq_dims=[1, 1]):
            self.manual_backward(F.mse_loss(self.net(x), y))
        optimizer.step()


def main(folder: Path) -> None:
    torch.backends.cuda.enable_math_sdp(False)  # context_parallel has no rule for it
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(4 * BATCH, LENGTH, WIDTH, generator=generator),
        torch.randn(4 * BATCH, LENGTH, WIDTH, generator=generator),
    )
    common = {
        "accelerator": "cuda", "precision": "bf16-mixed", "max_epochs": 2, "default_root_dir": folder, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    strategy = ModelParallelStrategy(context_parallel_size=2, tensor_parallel_size=1)
    trainer: Any = fulmen.Trainer(devices=2, strategy=strategy, **common)
    model = Parallel()
    trainer.fit(model, DataLoader(data, batch_size=BATCH))
    shared: Any = trainer.strategy.backend.module_state(trainer.strategy.model, full=True)
    if trainer.global_rank == 0:
        alone = Attention().cuda()
        alone.load_state_dict(start_weights())
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
        for _ in range(2):
            for x, y in DataLoader(data, batch_size=BATCH):
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = F.mse_loss(alone(x.cuda()), y.cuda())
                loss.backward()
                optimizer.step()
        want = torch.cat([value.flatten().cpu() for value in alone.state_dict().values()])
        start = torch.cat([value.flatten().cpu() for value in start_weights().values()])
        got = torch.cat([shared[f"net.{name}"].flatten() for name in alone.state_dict()])
        (folder / "result.json").write_text(
            json.dumps(
                {"distance": float((got - want).norm() / (want - start).norm()), "way": float((want - start).norm())}
            )
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
