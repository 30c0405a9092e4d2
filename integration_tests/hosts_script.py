"""What ``test_hosts.py`` starts on each host: trains a small model on all ranks, and writes down where each rank is."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
import warnings
from argparse import ArgumentParser, Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fulmen
from fulmen.callbacks import Callback, ModelCheckpoint
from fulmen.loggers import CSVLogger
from fulmen.strategies import DDPStrategy

SAMPLES, BATCH = 96, 2


def data() -> TensorDataset:
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(dim=1, keepdim=True))


def network(width: int) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))


class Model(fulmen.LightningModule):
    def __init__(self, asked: Namespace) -> None:
        super().__init__()
        self.layers = network(asked.width)
        self.asked = asked

    def prepare_data(self) -> None:
        folder = Path(self.asked.folder)
        with (folder / "prepared").open("a") as file:
            file.write(f"{socket.gethostname()} {self.trainer.local_rank}\n")

    def train_dataloader(self) -> Any:
        """In the order of the data: a step's samples on all ranks are the next ones, as one process would take them."""
        place = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        return DataLoader(data(), self.asked.batch, sampler=DistributedSampler(data(), shuffle=False, **place))

    def forward(self, x: Any) -> Any:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Watch(Callback):
    """Writes down each rank's step, and brings about what was asked for."""

    def __init__(self, asked: Namespace) -> None:
        self.asked, self.folder = asked, Path(asked.folder)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        draft = self.folder / f"draft-{trainer.global_rank}"
        draft.write_text(str(trainer.global_step))
        draft.rename(self.folder / f"step-{trainer.global_rank}")
        time.sleep(self.asked.pause)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        what, rank, step = self.asked.fault.split(":") if self.asked.fault else ("", "-1", "-1")
        if trainer.global_rank != int(rank) or trainer.global_step != int(step):
            return
        (self.folder / "fault-at").write_text(str(time.time()))
        if what == "raise":
            raise LookupError("sample 7 is missing")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(1000)


def strategy(asked: Namespace) -> Any:
    limit = timedelta(seconds=asked.timeout)
    if asked.strategy == "fsdp":
        from fulmen.strategies import FSDPStrategy  # what it needs of torch takes seconds to import

        return FSDPStrategy(timeout=limit, state_dict_type="sharded" if asked.sharded else "full")
    return DDPStrategy(timeout=limit)


def arguments(asked: Namespace) -> dict[str, Any]:
    given = {"devices": asked.devices, "num_nodes": asked.num_nodes}
    return {name: value for name, value in given.items() if value is not None}


def digest(model: Any) -> str:
    whole = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in model.named_parameters()}
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in whole.values())).hexdigest()


def train(asked: Namespace) -> None:
    folder = Path(asked.folder)
    callbacks: list[Any] = [Watch(asked)]
    if asked.save_every:
        callbacks.append(ModelCheckpoint(folder / "saved", every_n_train_steps=asked.save_every, save_last=True))
    trainer = fulmen.Trainer(
        accelerator="cpu", strategy=strategy(asked), max_steps=asked.steps, max_epochs=-1, callbacks=callbacks,
        logger=CSVLogger(str(folder)) if asked.logger else False, enable_progress_bar=asked.bar, log_every_n_steps=4,
        enable_checkpointing=bool(asked.save_every), enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, **arguments(asked),
    )  # fmt: skip
    model = Model(asked)
    trainer.fit(model, ckpt_path=asked.ckpt)
    found = {
        "rank": trainer.global_rank, "local_rank": trainer.local_rank, "node_rank": trainer.node_rank,
        "world_size": trainer.world_size, "host": socket.gethostname(), "step": trainer.global_step,
        "sha256": digest(model), "weights": [p.tolist() for p in whole(model)], "log_dir": str(trainer.log_dir),
    }  # fmt: skip
    (folder / f"trained-{trainer.global_rank}.json").write_text(json.dumps(found))


def whole(model: Any) -> list[torch.Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in model.parameters()]


def fabric(asked: Namespace) -> None:
    fabric = fulmen.Fabric(accelerator="cpu", strategy=strategy(asked), **arguments(asked))
    fabric.launch()
    model = Model(asked)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=asked.batch))
    step = 0
    while step < asked.steps:
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.mse_loss(wrapped(x), y))
            optimizer.step()
            step += 1
            if step == asked.steps:
                break
    found = {"rank": fabric.global_rank, "sha256": digest(model), "weights": [p.tolist() for p in whole(model)]}
    (Path(asked.folder) / f"trained-{fabric.global_rank}.json").write_text(json.dumps(found))


def main() -> None:
    warnings.simplefilter("ignore")
    parser = ArgumentParser()
    add = parser.add_argument
    add("folder")
    add("--fabric", action="store_true")
    add("--strategy", default="ddp")
    add("--devices", type=int)
    add("--num-nodes", type=int)
    add("--timeout", type=float, default=60)
    add("--steps", type=int, default=12)
    add("--batch", type=int, default=BATCH)
    add("--sharded", action="store_true")
    add("--width", type=int, default=6)
    add("--pause", type=float, default=0.0)
    add("--fault", default="")
    add("--save-every", type=int, default=0)
    add("--ckpt", default=None)
    add("--logger", action="store_true")
    add("--bar", action="store_true")
    asked = parser.parse_args()
    fabric(asked) if asked.fabric else train(asked)


if __name__ == "__main__":
    main()
