"""How many collectives a step of DDP or FSDP2 begins, raw and under the Trainer: ``SCRIPT FOLDER``."""

from __future__ import annotations

import json
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CSVLogger
from fulmen_strategies import FSDPStrategy

FOLDER = Path(sys.argv[1])
STEPS = 24
CALLED: list[str] = []


def begun() -> int:
    """Collectives of the default group so far, those that DDP issues from C++ among them."""
    group: Any = dist.group.WORLD
    return int(group._get_sequence_number_for_group())


def watch_python() -> None:
    """Note every call of a collective function of torch.distributed."""
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
        function = getattr(dist, name)

        def noted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            CALLED.append(name)
            return function(*args, **kwargs)

        setattr(dist, name, noted)


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((begun(), len(CALLED)))
        loss: Tensor = self.layers(batch).square().mean()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("mean over ranks", loss, on_epoch=True, on_step=False, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Linears(Model):
    """Two units to shard, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))


class Weighed(Linears):
    """Its losses are sums, with their weights beside them."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append((begun(), len(CALLED)))
        return {"loss": self.layers(batch).square().sum(), "weight": batch.new_tensor(len(batch))}


def sharded() -> dict[str, Any]:
    """What a step of FSDP2 begins, raw and under the Trainer, with and without accumulation."""
    found: dict[str, Any] = {}
    for name, accumulate in (("fsdp", 1), ("fsdp accumulated", 4)):
        model = Linears()
        data: Any = torch.randn(4 * STEPS, 4)  # torch takes any sequence for a data set
        fulmen.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=FSDPStrategy(auto_wrap_policy={nn.Linear}),
            max_epochs=1,
            logger=CSVLogger(FOLDER),
            log_every_n_steps=3,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=False,
        ).fit(model, DataLoader(data, batch_size=2))
        found[name] = per_step(model.seen)

        net, mesh = Linears().layers, init_device_mesh("cpu", (2,))
        for layer in (*net, net):
            fully_shard(layer, mesh=mesh)
        root: Any = net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        counts: list[int] = []
        for i in range(STEPS):
            counts.append(begun())
            is_last = (i + 1) % accumulate == 0
            root.set_requires_gradient_sync(is_last)
            net(torch.randn(2, 4)).mean().backward()
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
        found[f"raw {name}"] = [b - a for a, b in pairwise(counts)]
    return found


def weighed() -> dict[str, Any]:
    """The same with losses that are sums, and with the means of the same model."""
    found: dict[str, Any] = {}
    strategies: dict[str, Any] = {"ddp": lambda: "ddp", "fsdp": lambda: FSDPStrategy(auto_wrap_policy={nn.Linear})}
    for name, strategy in strategies.items():
        for accumulate in (1, 4):
            for weighting, kind in (("mean", Linears), ("weights", Weighed)):
                model = kind()
                data: Any = torch.randn(4 * STEPS, 4)  # torch takes any sequence for a data set
                fulmen.Trainer(
                    accelerator="cpu", devices=2, strategy=strategy(), max_epochs=1, logger=False, barebones=True,
                    accumulate_grad_batches=accumulate, loss_weighting=weighting,
                ).fit(model, DataLoader(data, batch_size=2))  # fmt: skip
                found[f"{name} {weighting} {accumulate}"] = per_step(model.seen)
    return found


def per_step(seen: list[tuple[int, int]]) -> list[list[int]]:
    return [[b[0] - a[0], b[1] - a[1]] for a, b in pairwise(seen)]


def main() -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, accumulate in (("plain", 1), ("accumulated", 4)):
        model = Model()
        trainer = fulmen.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=1,
            logger=CSVLogger(FOLDER),
            log_every_n_steps=3,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            callbacks=[ModelCheckpoint(FOLDER / name)],
            num_sanity_val_steps=0,
        )
        data: Any = torch.randn(2 * STEPS, 2, 4).reshape(-1, 4)
        if not found:
            watch_python()
        trainer.fit(model, DataLoader(data, batch_size=2))
        found[name] = per_step(model.seen)

        raw = Model()
        placed, optimizer = DistributedDataParallel(raw.layers), raw.configure_optimizers()
        counts: list[int] = []
        for i in range(STEPS):
            counts.append(begun())
            if (i + 1) % accumulate:
                with placed.no_sync():
                    placed(torch.randn(2, 4)).mean().backward()
            else:
                placed(torch.randn(2, 4)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        found[f"raw {name}"] = [b - a for a, b in pairwise(counts)]
    found |= sharded() | weighed()
    (FOLDER / f"counts-{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
