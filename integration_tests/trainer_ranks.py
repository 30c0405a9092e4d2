"""Runs the Trainer on two processes, in several ways, and writes what each rank saw as JSON.

``python trainer_ranks.py FOLDER cpu`` or ``cuda``; the latter tries the order of setup only
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen.plugins import LayerSync
from fulmen_accelerators import CPUAccelerator, CUDAAccelerator
from fulmen_precision import HalfPrecision
from fulmen_strategies import DDPStrategy

SEEN: dict[str, Any] = {}
ACCELERATOR = sys.argv[2]


def numbers(samples: int, start: int = 0, **options: Any) -> DataLoader[Any]:
    values = torch.arange(start, start + samples, dtype=torch.float32).reshape(samples, 1)
    return DataLoader(values, **{"batch_size": 2, **options})  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch.flatten().tolist())
        return self.norm(self.layer(batch)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(["val", *batch.flatten().tolist(), torch.is_inference_mode_enabled()])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(["test", *batch.flatten().tolist(), torch.is_inference_mode_enabled()])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": ACCELERATOR,
        "devices": 2,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "strategy": DDPStrategy(find_unused_parameters=True),
    }
    return fulmen.Trainer(**{**quiet, **options})


def order_of_setup() -> None:
    """Who sees the module in which state, from the device to the optimizers."""
    order: list[Any] = []

    class Accelerator(CUDAAccelerator if ACCELERATOR == "cuda" else CPUAccelerator):  # type: ignore[misc]
        def setup_device(self, device: torch.device) -> None:
            order.append(["accelerator", device.type])
            super().setup_device(device)

    def state(moment: str, module: nn.Module) -> None:
        norm = module.get_submodule("norm")
        order.append([moment, type(norm).__name__, str(next(norm.parameters()).dtype)])

    class Precision(HalfPrecision):
        def convert_module(self, module: nn.Module) -> nn.Module:
            state("precision", module)
            return super().convert_module(module)

        def prepare_optimizer(self, optimizer: Any) -> None:
            order.append(["precision", type(optimizer).__name__])

    class Strategy(DDPStrategy):
        def place(self, module: nn.Module) -> nn.Module:
            state("place", module)
            placed = super().place(module)
            order.append(["placed", type(placed).__name__, len(placed._comm_hooks)])
            return placed

        def prepare_optimizers(self, module: nn.Module, optimizers: Any) -> Any:
            [optimizer] = found = super().prepare_optimizers(module, optimizers)
            hooks = optimizer._optimizer_step_post_hooks
            averages = [type(hook).__name__ for hook in hooks.values()]
            order.append(["prepare_optimizers", type(module).__name__, *averages])
            return found

    class SyncedNorm(nn.BatchNorm1d):
        """In the place of torch's, which runs on GPUs only."""

    class Layers(LayerSync):
        """The user's own way of making layers communicate."""

        def apply(self, model: nn.Module) -> nn.Module:
            state("layers", model)
            self.own, model.norm = model.norm, SyncedNorm(1)
            model.norm.load_state_dict(self.own.state_dict())
            return model

        def revert(self, model: nn.Module) -> nn.Module:
            self.own.to(model.norm.weight.dtype).load_state_dict(model.norm.state_dict())
            model.norm = self.own
            return model

    class Watched(Model):
        def configure_optimizers(self) -> Any:
            state("configure_optimizers", self)
            order.append(["model", type(self.trainer.model).__name__, type(self.trainer.strategy.model).__name__])
            return super().configure_optimizers()

        def on_fit_start(self) -> None:
            state("on_fit_start", self)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                state("training_step", self)
            return super().training_step(batch, batch_idx)

        def on_fit_end(self) -> None:
            state("on_fit_end", self)

    model = Watched()
    own = model.norm
    on_gpus = ACCELERATOR == "cuda"
    run = trainer(
        sync_batchnorm=on_gpus,
        accelerator=Accelerator(),
        plugins=[Precision("bf16-true")] if on_gpus else [Precision("bf16-true"), Layers()],
        strategy=Strategy(
            find_unused_parameters=True,
            ddp_comm_hook=post_localSGD_hook,
            ddp_comm_state=PostLocalSGDState(None, None, start_localSGD_iter=100),
            model_averaging_period=1,
        ),
    )
    run.fit(model, numbers(8))
    SEEN["order"] = order
    SEEN["own layer is back"] = model.norm is own
    SEEN["its parameters are trained ones"] = model.norm.weight.dtype == torch.bfloat16
    SEEN["device"] = str(model.layer.weight.device)
    try:
        trainer(sync_batchnorm=True, accelerator="cpu").fit(Model(), numbers(8))
    except ValueError as error:
        SEEN["sync_batchnorm"] = str(error)


def samplers() -> None:
    for name, options, loader in (
        ("shuffled", {"max_epochs": 2}, numbers(8)),
        ("left alone", {"use_distributed_sampler": False}, numbers(8)),
        ("overfit", {"overfit_batches": 2, "max_epochs": 2}, numbers(8)),
    ):
        model = Model()
        trainer(**options).fit(model, loader, numbers(6, 100))
        SEEN[name] = model.seen
    model = Model()
    trainer().test(model, numbers(5), verbose=False)
    SEEN["tested"] = model.seen


def empty_on_one_rank() -> None:
    class Uneven(Model):
        def val_dataloader(self) -> Any:
            return numbers(0 if self.global_rank == 1 else 2, batch_sampler=None)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, allowed in (("empty", False), ("empty, allowed", True)):
            model = Uneven()
            model.allow_zero_length_dataloader_with_multiple_devices = allowed
            trainer(use_distributed_sampler=False).fit(model, numbers(8))
            SEEN[name] = sum(entry[0] == "val" for entry in model.seen)
            SEEN[f"{name}, said"] = [str(each.message) for each in caught if "has no batch" in str(each.message)]
            caught.clear()


def properties(folder: str) -> None:
    class Watched(Model):
        def on_train_start(self) -> None:
            made, strategy = self.trainer, self.trainer.strategy
            mine = torch.tensor([float(made.global_rank)])
            SEEN["properties"] = {
                "ranks": [made.global_rank, made.local_rank, made.node_rank, made.world_size],
                "counts": [made.num_nodes, made.num_devices, len(made.device_ids)],
                "zero": made.is_global_zero,
                "sampler": made.distributed_sampler_kwargs,
                "broadcast": strategy.broadcast(f"of rank {made.global_rank}"),
                "reduced": [strategy.reduce(mine, reduce_op=op).item() for op in ("mean", "sum", "max")],
                "gathered": strategy.all_gather(mine).flatten().tolist(),
                "all": strategy.reduce_boolean_decision(made.is_global_zero),
                "any": strategy.reduce_boolean_decision(made.is_global_zero, all=False),
                "model": type(made.model).__name__,
                "module": type(made.lightning_module).__name__,
                "distributed": made._accelerator_connector.is_distributed,
                "log_dir": made.log_dir,
            }

    run = trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint()], default_root_dir=folder)
    run.fit(Watched(), numbers(8))
    SEEN["best"] = run.checkpoint_callback.best_model_path


def skipped_on_one_rank() -> None:
    class Skipping(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    try:
        trainer().fit(Skipping(), numbers(8))
    except ValueError as error:
        SEEN["skipped"] = str(error)


def compiled() -> None:
    class Compiled(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).sum()
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

    found: dict[str, Any] = {}
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        model: Any = Compiled()
        run = trainer()
        run.fit(torch.compile(model, backend="eager", fullgraph=True) if name == "compiled" else model, numbers(8))
        found[name] = [model.layer.weight.item(), run.callback_metrics["loss"].item()]
    SEEN["compiled"] = found
    SEEN["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    properties(sys.argv[1])
    order_of_setup()
    if ACCELERATOR == "cpu":
        samplers()
        empty_on_one_rank()
        skipped_on_one_rank()
        compiled()
    rank = SEEN["properties"]["ranks"][0]
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(SEEN))
