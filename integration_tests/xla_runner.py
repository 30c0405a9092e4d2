"""Trains on XLA devices and on the CPU: ``python -m integration_tests.xla_runner SCENARIO FOLDER`` prints JSON.

The XLA part comes first: torch's autograd counts the devices at its first backward pass, and torch-xla has none before.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import ModelCheckpoint


class Norm(nn.BatchNorm1d):
    """Batch norm as on XLA, on the CPU too: it keeps the variance divided by, torch one n / (n - 1) times as large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(0), self.momentum)
            self.running_var.lerp_(x.var(0, unbiased=False), self.momentum)
            self.num_batches_tracked += 1
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Tied(fulmen.LightningModule):
    """A small network with a shared parameter, batch norm and dropout-free layers, so that two devices can agree."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = Norm(8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 1)
        self.losses: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(self.norm(x))))))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.losses.append(loss.detach())
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val", F.mse_loss(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def data() -> TensorDataset:
    torch.manual_seed(7)
    x = torch.randn(32, 8)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, num_workers=0)


def made() -> Tied:
    torch.manual_seed(3)
    return Tied()


def trainer(folder: Path, epochs: int, **settings: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        **settings,
    )


def weights(module: nn.Module) -> dict[str, list[float]]:
    return {name: value.detach().cpu().flatten().tolist() for name, value in module.state_dict().items()}


def fitted(folder: Path, **settings: Any) -> dict[str, Any]:
    """Two epochs in one go; and one, a checkpoint, and the second by a new Trainer."""
    module, whole = made(), trainer(folder, 2, enable_checkpointing=False, **settings)
    whole.fit(module, loader(), loader())
    found: dict[str, Any] = {
        "losses": [float(loss) for loss in module.losses],
        "val": float(whole.callback_metrics["val"]),
        "strategy": type(whole.strategy.backend).__name__,
        "precision": type(whole.assembly.precision).__name__,
        "checkpoint_io": type(whole.assembly.checkpoint_io).__name__,
        "tied": module.first.weight is module.second.weight,
        "devices": sorted({str(loss.device) for loss in module.losses}),
    }
    predicted = whole.predict(module, loader())
    found["predicted"] = torch.cat(predicted).flatten().tolist()  # type: ignore[arg-type]

    first = trainer(folder, 1, callbacks=[ModelCheckpoint(dirpath=folder, filename="first")], **settings)
    first.fit(made(), loader(), loader())
    path = folder / "first.ckpt"
    resumed, second = made(), trainer(folder, 2, enable_checkpointing=False, **settings)
    second.fit(resumed, loader(), loader(), ckpt_path=str(path))
    second.save_checkpoint(folder / "last.ckpt")
    found["resumed"] = [float(loss) for loss in resumed.losses]
    found["folder"] = path.is_dir()
    return found


def looped(folder: Path, **settings: Any) -> dict[str, Any]:
    """The same by a loop of one's own: two steps, a checkpoint, two steps; and the last two again from the "
    "checkpoint."""
    fabric = fulmen.Fabric(**settings)
    fabric.launch()

    def start() -> tuple[Any, Any]:
        module = made()
        if "fsdp" in type(fabric.strategy).__name__.lower():
            model = fabric.setup(module)
            return model, fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
        return fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))

    def steps(model: Any, optimizer: Any, batches: list[Any]) -> list[Any]:
        losses = []
        for x, y in batches:
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            losses.append(loss.detach())
        return losses

    batches = list(fabric.setup_dataloaders(loader()))
    model, optimizer = start()
    losses = steps(model, optimizer, batches[:2])
    fabric.save(folder / "fabric.ckpt", {"model": model, "optimizer": optimizer, "step": 2})
    losses += steps(model, optimizer, batches[2:])
    again, optimizer = start()
    state = {"model": again, "optimizer": optimizer, "step": 0}
    fabric.load(folder / "fabric.ckpt", state)
    return {
        "losses": [float(loss) for loss in losses],
        "again": [float(loss) for loss in steps(again, optimizer, batches[2:])],
        "step": state["step"],
        "strategy": type(fabric.strategy).__name__,
    }


def profiled(folder: Path) -> dict[str, Any]:
    """Two batches of a sanity check and four of an epoch's validation, and whether somebody listens at the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    profiler = fulmen.profilers.XLAProfiler(port=port)
    run = trainer(folder, 1, accelerator="xla", enable_checkpointing=False, profiler=profiler)
    run.fit(made(), loader(), loader())
    with socket.socket() as client:
        listens = client.connect_ex(("127.0.0.1", port)) == 0
    numbered = {name.rpartition(".")[2]: count for name, count in profiler._steps.items()}
    return {"listens": listens, "numbered": numbered, "open": sorted(profiler._open)}


def main(scenario: str, folder: Path) -> dict[str, Any]:
    if scenario == "profiler":
        return profiled(folder)
    from fulmen_xla import XLAShardedCheckpointIO, XLASPMDStrategy

    xla: dict[str, Any] = {"accelerator": "xla"}
    if scenario == "spmd-sharded":
        xla["strategy"] = XLASPMDStrategy(state_dict_type="sharded", auto_wrap_policy={nn.Linear})
    elif scenario == "spmd-dcp":
        xla["strategy"] = XLASPMDStrategy(state_dict_type="sharded", data_parallel_size=2)
        xla["plugins"] = XLAShardedCheckpointIO()
    elif scenario != "auto":
        xla["strategy"] = scenario
    results: dict[str, Any] = {}
    for name, settings in (("xla", xla), ("cpu", {"accelerator": "cpu", "devices": 1})):
        here = folder / name
        here.mkdir()
        results[name] = {"fabric": looped(here, **settings)}
        if name == "xla" and "strategy" in settings and not isinstance(settings["strategy"], str):
            settings = {**settings, "strategy": type(settings["strategy"])(**again(scenario))}
        results[name]["trainer"] = fitted(here, **settings)
    return results


def again(scenario: str) -> dict[str, Any]:
    """The arguments of a new strategy: one object serves one run."""
    if scenario == "spmd-dcp":
        return {"state_dict_type": "sharded", "data_parallel_size": 2}
    return {"state_dict_type": "sharded", "auto_wrap_policy": {nn.Linear}}


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
