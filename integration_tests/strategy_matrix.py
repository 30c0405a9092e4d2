"""Trains one model by every strategy in every precision, with the Trainer and with Fabric; rank 0 writes the weights.

``python strategy_matrix.py FOLDER RANKS TASK...``. With one rank it is what the others are compared with. Tasks:
``train`` does that, ``save`` trains half of the epochs and saves, ``resume`` goes on from every checkpoint there is,
``fabric`` saves and loads without a Trainer.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.strategies import FSDPStrategy, ModelParallelStrategy

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES, WINDOW, EPOCHS = 16, 2, 6
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(SAMPLES, 6, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)
    )


class Body(nn.Module):
    """Two layers for plans, and others for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(torch.relu(self.first(x)))))


def tensor_parallel(module: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(
        module, mesh["tensor_parallel"], {"first": ColwiseParallel(), "second": RowwiseParallel()}
    )


def both(module: nn.Module, mesh: Any) -> nn.Module:
    tensor_parallel(module, mesh)
    for layer in (module.first, module.second):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


class Model(fulmen.LightningModule):
    """Places itself as it is told to; as every user's model it may be built once only."""

    def __init__(self, parallelize: Any = None) -> None:
        super().__init__()
        self.parallelize = parallelize
        self.body: Any = None

    def configure_model(self) -> None:
        if self.body is not None:
            return
        torch.manual_seed(0)
        self.body = Body()
        if self.parallelize is not None:
            self.parallelize(self.body, self.device_mesh)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.body(batch[0]).float(), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("seen", float(len(batch[0])), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Case(NamedTuple):
    """A strategy, how the model places itself for it, and among how many ranks the data are split."""

    make: Callable[..., Any]
    parallelize: Any
    parts: int


def strategies(ranks: int) -> dict[str, Case]:
    if ranks == 1:
        return {"one": Case(lambda **_: "auto", None, 1)}
    sizes = {"data_parallel_size": ranks // 2, "tensor_parallel_size": 2}
    return {
        "ddp": Case(lambda **_: "ddp", None, ranks),
        "fsdp2": Case(lambda **own: FSDPStrategy(auto_wrap_policy={nn.Linear}, **own), None, ranks),
        "tp": Case(lambda **own: ModelParallelStrategy(**own), tensor_parallel, 1),
        "fsdp2 x tp": Case(lambda **own: ModelParallelStrategy(**own, **sizes), both, ranks // 2),
    }


def quiet(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "accelerator": "cpu", "max_epochs": EPOCHS, "default_root_dir": folder, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, **options,
    }  # fmt: skip


def whole(trainer: fulmen.Trainer) -> dict[str, torch.Tensor]:
    backend, placed = trainer.strategy.backend, trainer.strategy.model
    if hasattr(backend, "module_state"):
        return dict(backend.module_state(placed, full=True))
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


def trainer_for(folder: Path, ranks: int, name: str, precision: str, epochs: int, **own: Any) -> Any:
    return fulmen.Trainer(
        devices=ranks, strategy=strategies(ranks)[name].make(**own), precision=precision,
        accumulate_grad_batches=WINDOW, gradient_clip_val=0.4, **quiet(folder, max_epochs=epochs),
    )  # fmt: skip


def loader_for(ranks: int, name: str) -> DataLoader[Any]:
    # An epoch is one window and holds all samples, in whatever order: every number of ranks has the same gradient.
    return DataLoader(samples(), batch_size=SAMPLES // WINDOW // strategies(ranks)[name].parts)


def by_trainer(folder: Path, ranks: int, name: str, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    trainer = trainer_for(folder, ranks, name, precision, EPOCHS)
    trainer.fit(Model(strategies(ranks)[name].parallelize), loader_for(ranks, name))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return whole(trainer), metrics


def by_fabric(folder: Path, ranks: int, name: str, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    make, parallelize, _ = strategies(ranks)[name]
    strategy = make() if parallelize is None else make(parallelize_fn=parallelize)
    fabric = fulmen.Fabric(accelerator="cpu", devices=ranks, strategy=strategy, precision=precision)
    fabric.launch()
    torch.manual_seed(0)
    with fabric.init_module():
        body = Body()
    optimizer = torch.optim.SGD(body.parameters(), lr=0.2, momentum=0.9)
    model, optimizer = fabric.setup(body, optimizer)
    loader = fabric.setup_dataloaders(loader_for(ranks, name))
    norms = []
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            last = index == WINDOW - 1
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(F.cross_entropy(model(x).float(), y) / WINDOW)
        norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.4)))
        optimizer.step()
        optimizer.zero_grad()
    state = {f"body.{key}": value.detach().clone() for key, value in model.state_dict().items()}
    if hasattr(fabric.strategy, "module_state"):
        state = {f"body.{key}": value for key, value in fabric.strategy.module_state(model.placed, full=True).items()}
    return state, {"norms": norms}


def train(folder: Path, ranks: int) -> None:
    told: dict[str, Any] = {}
    for name in strategies(ranks):
        for precision in PRECISIONS:
            for kind, run in (("trainer", by_trainer), ("fabric", by_fabric)):
                state, numbers = run(folder, ranks, name, precision)
                if rank() == 0:
                    torch.save(state, folder / f"{ranks} {name} {precision} {kind}.pt")
                    told[f"{name} {precision} {kind}"] = numbers
    if rank() == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(told))


def save(folder: Path, ranks: int) -> None:
    """By every strategy, as one file and where it can as a folder of shards."""
    kinds: dict[str, list[dict[str, Any]]] = {
        "fsdp2": [{"state_dict_type": "full"}, {"state_dict_type": "sharded"}],
        "tp": [{"save_distributed_checkpoint": False}, {}],
        "fsdp2 x tp": [{"save_distributed_checkpoint": False}, {}],
    }
    for name, case in strategies(ranks).items():
        for kind, own in zip(("file", "folder"), kinds.get(name, [{}]), strict=False):
            trainer = trainer_for(folder, ranks, name, "32-true", EPOCHS // 2, **own)
            trainer.fit(Model(case.parallelize), loader_for(ranks, name))
            trainer.save_checkpoint(folder / f"{ranks} {name} {kind}.ckpt")


def resume(folder: Path, ranks: int) -> None:
    found = sorted(one.name for one in folder.glob("*.ckpt"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # every rank has looked before anything is written
    for name, case in strategies(ranks).items():
        for checkpoint in found:
            target = folder / f"{checkpoint} on {ranks} {name}.pt"
            if target.exists():
                continue
            trainer = trainer_for(folder, ranks, name, "32-true", EPOCHS)
            trainer.fit(Model(case.parallelize), loader_for(ranks, name), ckpt_path=folder / checkpoint)
            assert trainer.global_step == EPOCHS
            state = whole(trainer)
            trainer.strategy.barrier()
            if rank() == 0:
                torch.save(state, target)


def fabric(folder: Path, ranks: int) -> None:
    """What Fabric saves and loads: a folder or a file of model and optimizer, and the bare weights; compiled or not."""
    told: dict[str, Any] = {}
    for name, case in strategies(ranks).items():
        if case.parallelize is None:
            continue
        for kind in ("folder", "file"):

            def compiled(module: nn.Module, mesh: Any, parallelize: Any = case.parallelize) -> nn.Module:
                parallelize(module, mesh)
                module.first = torch.compile(module.first, backend="eager")
                return module

            strategy = case.make(parallelize_fn=compiled, save_distributed_checkpoint=kind == "folder")
            fabric = fulmen.Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
            fabric.launch()
            model, optimizer, x = *_set_up(fabric, 0), torch.ones(4, 6)
            fabric.backward(model(x).square().mean())
            optimizer.step()
            path, bare = folder / f"fabric {ranks} {name} {kind}", folder / f"bare {ranks} {name} {kind}.pt"
            fabric.save(path, {"model": model, "optimizer": optimizer, "step": 1})
            want = strategy.module_state(model.placed, full=True)
            if fabric.global_rank == 0:
                torch.save(dict(want), bare)
            fabric.barrier()
            other, its_optimizer = _set_up(fabric, 1)
            state = {"model": other, "optimizer": its_optimizer, "step": 0}
            fabric.load(path, state)
            loaded = strategy.module_state(other.placed, full=True)
            momenta = its_optimizer.state_dict().get("state", {})
            raw, _ = _set_up(fabric, 2)
            fabric.load_raw(bare, raw)
            read = strategy.module_state(raw.placed, full=True)
            told[f"{name} {kind}"] = {
                "is a folder": path.is_dir(),
                "names": list(want),
                "equal": all(torch.equal(loaded[key], want[key]) and torch.equal(read[key], want[key]) for key in want),
                "step": state["step"],
                "momenta": len(momenta),
            }
    if rank() == 0:
        (folder / f"fabric {ranks}.json").write_text(json.dumps(told))


def _set_up(fabric: fulmen.Fabric, seed: int) -> Any:
    torch.manual_seed(seed)
    body = Body()
    return fabric.setup(body, torch.optim.SGD(body.parameters(), lr=0.2, momentum=0.9))


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for task in sys.argv[3:]:
        {"train": train, "save": save, "resume": resume, "fabric": fabric}[task](Path(sys.argv[1]), int(sys.argv[2]))
