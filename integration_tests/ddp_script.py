"""Trains one small model on two gloo processes, by hand with DDP or through the Trainer, and prints a digest of it.

``python ddp_script.py raw FOLDER OPTIMIZER ACCUMULATE`` is started by torchrun; ``python ddp_script.py fulmen ...``
by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def dataset(samples: int = 44) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 8, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def optimizer_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return torch.optim.Adam(parameters, lr=0.01)


def digest(module: nn.Module) -> str:
    # Buffers of BatchNorm are each rank's own under DDP until the next forward: parameters tell whether training
    # agreed.
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


def report(folder: str, rank: int, **values: Any) -> None:
    Path(folder, f"rank{rank}.json").write_text(json.dumps(values))


def raw(folder: str, optimizer_name: str, accumulate: int) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    net = model()
    ddp = DistributedDataParallel(net)
    optimizer = optimizer_of(optimizer_name, net.parameters())
    data = dataset()
    sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=True, seed=0)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    ddp.train()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(loader):
            stepping = (index + 1) % accumulate == 0 or index + 1 == len(loader)
            if index % accumulate == 0:
                optimizer.zero_grad()
            if stepping:
                (F.cross_entropy(ddp(x), y) / accumulate).backward()
                optimizer.step()
            else:
                with ddp.no_sync():
                    (F.cross_entropy(ddp(x), y) / accumulate).backward()
    report(folder, rank, digest=digest(net))
    torch.distributed.destroy_process_group()


def through_the_trainer(folder: str, optimizer_name: str, accumulate: int) -> None:
    import fulmen

    class Model(fulmen.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()
            self.seen: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            if self.global_rank == 1:
                self.log("only_rank_1", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            # The mean over ranks is exact only if every sample is evaluated exactly once.
            self.log("val_mean", batch[0].sum(1).mean(), sync_dist=True, batch_size=len(batch[0]))
            self.seen.append(len(batch[0]))

        def configure_optimizers(self) -> Any:
            return optimizer_of(optimizer_name, self.parameters())

    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Model()
    trainer.fit(module, DataLoader(dataset(), batch_size=4, shuffle=True), DataLoader(dataset(13), batch_size=3))
    trained = digest(module)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    module.seen.clear()
    validated = trainer.validate(module, DataLoader(dataset(13), batch_size=3), verbose=False)
    report(
        folder,
        trainer.global_rank,
        digest=trained,
        metrics=metrics,
        validated=validated,
        seen=sum(module.seen),
        checkpoints=sorted(str(path.name) for path in Path(folder).rglob("*.ckpt")),
        steps=trainer.global_step,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    (raw if sys.argv[1] == "raw" else through_the_trainer)(sys.argv[2], sys.argv[3], int(sys.argv[4]))
