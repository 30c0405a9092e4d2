"""Ranks with unequal data under the Trainer: ``python uneven_script.py WORLD FOLDER``; what they saw, as JSON.

With four ranks also training; with any number the evaluation of 1 to 50 samples.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

import fulmen
from fulmen_fabric import UnevenRounds
from fulmen_strategies import DDPStrategy, FSDPStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator

WORLD = int(sys.argv[1])
SEEN: dict[str, Any] = {}
BATCHES_OF_RANKS = (7, 5, 9, 0)


def batches_of(rank: int) -> list[Tensor]:
    """Of 1 to 4 samples each; every rank can make those of every other."""
    draw = torch.Generator().manual_seed(rank)
    sizes = torch.randint(1, 5, (BATCHES_OF_RANKS[rank],), generator=draw).tolist()
    return [torch.randn(size, 3, generator=draw, dtype=torch.float64) for size in sizes]


class Stream(IterableDataset[Tensor]):
    """Batches that say nothing of their number."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class CountsCalls(nn.Module):
    """A buffer that counts samples: what a borrowed batch adds to it must be taken back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("samples", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return x


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.counts = CountsCalls()
        self.rounds: list[int] = []
        self.hooks = 0

    def loss(self, batch: Tensor) -> Tensor:
        return self.layers(batch).square().mean()  # type: ignore[no-any-return]  # torch says Any of it

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rounds.append(batch_idx)
        loss = self.loss(self.counts(batch))
        self.log("loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True)
        self.log("samples", float(len(batch)), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.hooks += 1
        self.log("ends", 1.0, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class ManualModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]  # with other arguments, on purpose
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": WORLD,
        "strategy": DDPStrategy(broadcast_buffers=False) if WORLD > 1 else "auto",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return fulmen.Trainer(**{**quiet, **options})


def weights_of(module: nn.Module) -> list[float]:
    """All in one list; gathered where each rank has a shard. A collective, then."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in whole]).tolist()


def sharded() -> Any:
    """Every linear layer on its own, and the rest: each forward and backward pass is several collectives."""
    return FSDPStrategy(auto_wrap_policy={nn.Linear})


def training(prefix: str = "", strategy: Any = None) -> None:
    """Two epochs each: with sizes known or not, with accumulation, with manual optimization, resumed."""
    cases: dict[str, tuple[type[Model], dict[str, Any], bool]] = {
        "sized": (Model, {}, True),
        "unsized": (Model, {}, False),
        "accumulated": (Model, {"accumulate_grad_batches": 2}, True),
        "accumulated, unsized": (Model, {"accumulate_grad_batches": 4}, False),
        "clipped": (Model, {"gradient_clip_val": 0.05}, True),
        "manual": (ManualModel, {}, True),
        "few": (Model, {"limit_train_batches": 6, "max_epochs": 1}, True),
    }
    for name, (kind, options, sized) in cases.items():
        model = kind()

        def train_dataloader(sized: bool = sized, model: Model = model) -> Any:
            own = batches_of(model.global_rank)
            return Batches(own) if sized else DataLoader(Stream(own), batch_size=None)

        model.train_dataloader = train_dataloader  # type: ignore[method-assign]  # replaced on purpose
        if strategy is not None:
            options = {**options, "strategy": strategy()}
        run = trainer(use_distributed_sampler=False, **options)
        run.fit(model)
        SEEN[prefix + name] = {
            "weights": weights_of(model.layers),
            "rounds": model.rounds,
            "hooks": model.hooks,
            "steps": run.global_step,
            "batches": run.num_training_batches if sized else None,
            "counted": model.counts.samples.item(),
            "metrics": {name: value.item() for name, value in run.callback_metrics.items()},
        }


class Batches:
    """A sized loader that is no DataLoader."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class Evaluated(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        value = batch.square().mean()
        self.log("mean", value, sync_dist=True)
        self.log("sum", batch.sum(), sync_dist=True, reduce_fx="sum")
        self.log("max", batch.max(), sync_dist=True, reduce_fx="max")
        self.log("min", batch.min(), sync_dist=True, reduce_fx="min")


def evaluation() -> None:
    model, run = Evaluated(), trainer()
    for samples in range(1, 51):
        data = torch.arange(1, samples + 1, dtype=torch.float32).reshape(samples, 1)
        loader: Any = DataLoader(data, batch_size=3)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        SEEN[f"evaluated {samples}"] = run.validate(model, loader, verbose=False)[0]


def evaluation_of_unequal_loaders() -> None:
    """Loaders that each rank has made for itself."""
    model = Evaluated()

    def val_dataloader() -> Any:
        return Batches([batch.float() for batch in batches_of(model.global_rank)])

    model.val_dataloader = val_dataloader  # type: ignore[method-assign]  # replaced on purpose
    SEEN["evaluated own"] = trainer(use_distributed_sampler=False).validate(model, verbose=False)[0]


class Gathering(Evaluated):
    """Its forward pass is a collective, as that of a sharded module is: a rank that is through must join the others."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = CountsCalls()
        self.hooks = 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        dist.all_reduce(torch.ones(()))
        super().validation_step(self.counts(batch), batch_idx)

    test_step = validation_step

    def on_validation_batch_end(self, *_: Any) -> None:
        self.hooks += 1

    on_test_batch_end = on_validation_batch_end


class Sharded(Gathering):
    """Its forward pass is FSDP2's."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch[:, :1])
        super().validation_step(batch, batch_idx)

    test_step = validation_step


def _place(self: DDPStrategy, module: nn.Module) -> nn.Module:
    return DDPStrategy.place_for_inference(self, module)


# DDP without a placement of its own for inference, as a strategy that shards has none.
AlwaysPlaced: Any = type(
    "AlwaysPlaced",
    (),
    {
        **{
            name: member
            for kind in reversed(DDPStrategy.__mro__[:-1])
            for name, member in vars(kind).items()
            if name not in ("place_for_inference", "__dict__", "__weakref__")
        },
        "place": _place,
    },
)


def evaluation_that_communicates() -> None:
    cases: dict[str, tuple[type[Gathering], Any, bool]] = {
        "joined": (Gathering, AlwaysPlaced, True),
        "joined, unsized": (Gathering, AlwaysPlaced, False),
        "joined, fsdp": (Sharded, sharded, True),
        "joined, fsdp, unsized": (Sharded, sharded, False),
    }
    for name, (kind, strategy, sized) in cases.items():
        model = kind()

        def loader(sized: bool = sized, model: Gathering = model) -> Any:
            own = [batch.float() for batch in batches_of(model.global_rank)]
            return Batches(own) if sized else DataLoader(Stream(own), batch_size=None)

        model.val_dataloader = model.test_dataloader = loader  # type: ignore[method-assign]  # replaced on purpose
        found = trainer(use_distributed_sampler=False, strategy=strategy()).validate(model, verbose=False)[0]
        SEEN[name] = {"metrics": found, "hooks": model.hooks, "counted": model.counts.samples.item()}
        run = trainer(use_distributed_sampler=False, strategy=strategy(), limit_test_batches=6)
        run.test(model, verbose=False)
        SEEN[name]["tested"] = model.hooks - SEEN[name]["hooks"]


def fabric() -> None:
    """A loop of one's own, with DDP around the module."""
    run = fulmen.Fabric(accelerator="cpu", devices=WORLD, strategy=DDPStrategy())
    run.launch()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model, optimizer = run.setup(layers, torch.optim.Adam(layers.parameters(), lr=0.05))
    strategy: Any = run.strategy
    rounds = UnevenRounds(strategy.collectives)
    for _ in range(2):
        for batch, _ in rounds.over(batches_of(run.global_rank)):
            loss = model(batch).square().mean()
            run.backward(rounds.weigh(loss))
            optimizer.step()
            optimizer.zero_grad()
    SEEN["fabric"] = weights_of(layers)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    evaluation()
    if WORLD == 4:
        training()
        training("fsdp ", sharded)
        evaluation_of_unequal_loaders()
        evaluation_that_communicates()
        fabric()
    rank = fulmen.utilities.rank_zero_only.rank if WORLD > 1 else 0
    Path(sys.argv[2], f"rank{rank}.json").write_text(json.dumps(SEEN))
