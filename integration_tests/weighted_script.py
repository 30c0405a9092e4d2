"""Language models whose losses are sums with their weights, on ranks: ``weighted_script.py WORLD FOLDER [cuda]``.

Each case draws a global batch for every optimizer step and splits it at random into micro-batches, ranks and padding.
What the ranks end with is compared by the test with plain PyTorch on each global batch at once.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import Callback
from fulmen.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from fulmen_fabric import LossWeights

VOCABULARY, PADDED = 11, -100
MicroBatch = tuple[Tensor, Tensor]


@dataclass
class Case:
    """One run. ``batches[rank]`` are a rank's micro-batches; windows are of ``accumulate`` of them."""

    seed: int
    world: int
    accumulate: int = 1
    rounds: int = 6
    clip: float | None = None
    precision: str = "64-true"
    uneven: bool = False
    empty_window: int | None = None
    """Index of a window in which everything is padding."""
    batches: list[list[MicroBatch]] = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        self.batches = []
        for rank in range(self.world):
            rounds = self.rounds - (1 + rank if self.uneven and rank else 0)
            own = [_micro_batch(draw) for _ in range(rounds)]
            for index, (_, targets) in enumerate(own):
                if index // self.accumulate == self.empty_window:
                    targets.fill_(PADDED)
            self.batches.append(own)

    @property
    def windows(self) -> list[list[MicroBatch]]:
        """All micro-batches of all ranks by optimizer step; the last one may have fewer."""
        starts = range(0, self.rounds, self.accumulate)
        return [[one for own in self.batches for one in own[start : start + self.accumulate]] for start in starts]


def _micro_batch(draw: torch.Generator) -> MicroBatch:
    """1 to 4 sequences of 1 to 7 tokens, each padded by a length of its own; one in six holds nothing but padding."""
    count, length, lot = (int(torch.randint(1, high, (), generator=draw)) for high in (5, 8, 7))
    inputs, targets = (torch.randint(0, VOCABULARY, (count, length), generator=draw) for _ in range(2))
    kept = torch.randint(0, length + 1, (count, 1), generator=draw)
    targets[torch.arange(length) >= kept] = PADDED
    return inputs, targets.fill_(PADDED) if lot == 6 else targets


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, VOCABULARY))


def summed_loss(net: nn.Module, batch: MicroBatch) -> Tensor:
    logits = net(batch[0]).flatten(0, 1)
    return F.cross_entropy(logits, batch[1].flatten(), ignore_index=PADDED, reduction="sum")


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.gradients: list[Tensor] = []

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        return {"loss": summed_loss(self.net, batch), "weight": (batch[1] != PADDED).sum()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(flat(parameter.grad for parameter in self.net.parameters()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Unread(Model):
    """Waiting for the device is an error while weights, which lie on it, are summed and divided by."""

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        # The first two windows load kernels and set up communication, and DDP arranges its buckets anew.
        is_warm = batch_idx >= 2 * self.trainer.accumulate_grad_batches
        torch.cuda.set_sync_debug_mode("error" if is_warm else "default")

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        loss = self.net(batch[0]).square().sum()
        return {"loss": loss, "weight": (batch[1] != PADDED).sum()}


class Counted(Model):
    """Weights are numbers that the host knows, which depend on the batch's index only in their type."""

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        tokens = int((batch[1] != PADDED).sum())
        return {"loss": summed_loss(self.net, batch), "weight": float(tokens) if batch_idx % 2 else tokens}


class TensorParallel(Model):
    def configure_model(self) -> None:
        if not isinstance(next(self.net[1].parameters()), DTensor):
            mesh: Any = self.device_mesh
            plan: Any = {"1": ColwiseParallel(), "3": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
            if mesh["data_parallel"].size() > 1:
                fully_shard(self.net, mesh=mesh["data_parallel"])


def flat(tensors: Any) -> Tensor:
    """All in one; gathered where each rank has a shard. A collective, then."""
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in tensors]
    return torch.cat([each.detach().flatten().clone() for each in whole])


def trainer(strategy: Any, case: Case, **options: Any) -> fulmen.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": case.world, "strategy": strategy, "max_epochs": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "num_sanity_val_steps": 0, "precision": case.precision,
        "accumulate_grad_batches": case.accumulate, "gradient_clip_val": case.clip, "loss_weighting": "weights",
    }  # fmt: skip
    return fulmen.Trainer(**{**quiet, **options})


def trained(strategy: Any, case: Case, kind: type[Model] = Model, ckpt_path: Any = None, **options: Any) -> Any:
    model = kind()
    run = trainer(strategy, case, **options)

    def train_dataloader() -> Any:
        own: Any = case.batches[run.world.data_parallel_rank]  # torch takes any sequence for a data set
        return DataLoader(own, batch_size=None)

    model.train_dataloader = train_dataloader  # type: ignore[method-assign]  # replaced on purpose
    run.fit(model, ckpt_path=ckpt_path)
    return {
        "gradients": torch.stack(model.gradients).cpu(),
        "weights": flat(model.net.parameters()).cpu(),
        "steps": run.global_step,
    }


def reference(case: Case) -> dict[str, Any]:
    """Plain PyTorch: each global batch in one process, at once, divided by its number of tokens."""
    net = network().to(torch.float64 if case.precision == "64-true" else torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    gradients: list[Tensor] = []
    for window in case.windows:
        optimizer.zero_grad()
        tokens = sum(int((targets != PADDED).sum()) for _, targets in window)
        (torch.stack([summed_loss(net, batch) for batch in window]).sum() / max(tokens, 1)).backward()
        gradients.append(flat(parameter.grad for parameter in net.parameters()))
        if case.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        optimizer.step()
    return {"gradients": torch.stack(gradients), "weights": flat(net.parameters()), "steps": len(gradients)}


def cases(world: int) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for seed in range(6 if world == 1 else 4):
        found[f"split {seed}"] = Case(seed, world, accumulate=1 + seed % 4, rounds=5 + seed)
        found[f"split {seed}, single"] = Case(10 + seed, world, 1 + seed % 3, 7, precision="32-true")
    found["tail"] = Case(20, world, accumulate=4, rounds=6)
    found["clipped"] = Case(21, world, accumulate=2, rounds=6, clip=0.05)
    found["empty"] = Case(22, world, accumulate=2, rounds=6, empty_window=1)
    found["empty at first"] = Case(23, world, accumulate=2, rounds=6, empty_window=0)
    if world > 1:
        found["uneven"] = Case(24, world, accumulate=2, rounds=7, uneven=True)
    return found


def strategies(world: int) -> dict[str, Any]:
    if world == 1:
        return {"alone": lambda: "auto", "fsdp": _fsdp}
    return {
        "ddp": lambda: DDPStrategy(broadcast_buffers=False),
        "fsdp": _fsdp,
        "fsdp, each": lambda: _fsdp(reduce_accumulated="each"),
    }


def _fsdp(**options: Any) -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={nn.Linear}, **options)


def on_a_mesh(parts: int) -> Case:
    """For ``parts`` pairs of ranks, of which each trains on the same micro-batches."""
    return Case(40, parts, accumulate=2, rounds=5)


HALF = {"ddp": ("16-mixed", "bf16-mixed"), "fsdp": ("16-mixed", "bf16-mixed", "bf16-true")}
"""Precisions of which the first gradients are looked at."""


class Saves(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"batch-{batch_idx}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "epoch")


def resumed(folder: Path, world: int) -> dict[str, Any]:
    """The weights of a whole run, and of runs that go on from each of its batches."""
    found: dict[str, Any] = {}
    for name, strategy in strategies(world).items():
        case = Case(30, world, accumulate=3, rounds=8)
        place = folder / f"{world} {name}"
        whole = trained(strategy(), case, callbacks=[Saves(place)])
        later = {i: trained(strategy(), case, ckpt_path=place / f"batch-{i}") for i in (1, 3)}
        found[name] = {"whole": whole["weights"], "later": {i: each["weights"] for i, each in later.items()}}
    return found


def by_fabric(case: Case) -> dict[str, Any]:
    """A loop of one's own."""
    run: Any = fulmen.Fabric(accelerator="cpu", devices=case.world, strategy="ddp" if case.world > 1 else "auto")
    run.launch()
    net = network().double()
    model, optimizer = run.setup(net, torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
    weights = LossWeights(run.strategy.collectives if case.world > 1 else None)
    own, gradients = case.batches[run.global_rank], []
    for index, batch in enumerate(own):
        is_last = (index + 1) % case.accumulate == 0 or index + 1 == len(own)
        with run.no_backward_sync(model, enabled=not is_last):
            loss = summed_loss(model, batch)
            run.backward(weights.add(loss, (batch[1] != PADDED).sum(), is_last=is_last and index % 2 == 0))
        if is_last:
            weights.scale_gradients(optimizer)
            gradients.append(flat(parameter.grad for parameter in net.parameters()))
            optimizer.step()
            optimizer.zero_grad()
    return {"gradients": torch.stack(gradients), "weights": flat(net.parameters()), "steps": len(gradients)}


def on_pairs(parts: int) -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=parts, tensor_parallel_size=2)
    return trained(strategy, on_a_mesh(parts), TensorParallel, devices=2 * parts)  # type: ignore[no-any-return]  # of Any, on purpose


def on_gpus(folder: Path) -> None:
    """Every case of two ranks by NCCL; then without any read of the host."""
    found: dict[str, Any] = {}
    for name, strategy in strategies(2).items():
        for label, case in cases(2).items():
            found[f"{label}, {name}"] = trained(
                strategy(), case, Counted if case.seed % 2 else Model, accelerator="cuda"
            )
        trained(strategy(), Case(60, 2, accumulate=2, rounds=10, precision="32-true"), Unread, accelerator="cuda")
    torch.save(found, folder / f"2-{fulmen.utilities.rank_zero_only.rank}.pt")


def main(world: int, folder: Path) -> None:
    found: dict[str, Any] = {}
    if world == 4:
        torch.save({"mesh": on_pairs(2)}, folder / f"4-{fulmen.utilities.rank_zero_only.rank}.pt")
        return
    for name, strategy in strategies(world).items():
        for label, case in cases(world).items():
            found[f"{label}, {name}"] = trained(strategy(), case, Counted if case.seed % 2 else Model)
    found["resumed"] = resumed(folder, world)
    found["fabric"] = by_fabric(cases(world)["tail"])
    if world == 2:
        for name, precisions in HALF.items():
            for precision in precisions:
                case = Case(50, 2, accumulate=2, rounds=4, precision=precision)
                found[f"{precision}, {name}"] = trained(strategies(2)[name](), case)
        found["mesh"] = on_pairs(1)
    rank = fulmen.utilities.rank_zero_only.rank if world > 1 else 0
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[3:] == ["cuda"]:
        on_gpus(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]), Path(sys.argv[2]))
