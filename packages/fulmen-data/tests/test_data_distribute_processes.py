"""Ranks that are real processes with random states of their own."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, WeightedRandomSampler

from fulmen_data import distribute_loader, set_epoch

pytestmark = pytest.mark.processes

WORLD = 2


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(23, 4, generator=generator), torch.arange(23))


def train(rank: int, loader: DataLoader, tell_epoch) -> list[torch.Tensor]:
    torch.manual_seed(7)
    model = DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(3):
        tell_epoch(epoch)
        for x, _ in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    try:
        ours = distribute_loader(
            DataLoader(data(), 4), rank=rank, world_size=WORLD, shuffle=True, training=True, seed=0
        )
        raw = DataLoader(data(), 4, sampler=DistributedSampler(data(), shuffle=True, seed=0))
        ours_after = train(rank, ours, lambda epoch: set_epoch(ours, epoch))
        raw_after = train(rank, raw, raw.sampler.set_epoch)
        for got, expected in zip(ours_after, raw_after, strict=True):
            assert torch.equal(got, expected), "not one bit may differ from a raw DDP loop"

        torch.manual_seed(100 + rank)  # the ranks' random states have drifted apart
        own = DataLoader(data(), 4, sampler=WeightedRandomSampler([1.0] * 23, 23, replacement=False))
        for training, loader in [(True, own), (False, own), (False, DataLoader(data(), 4, shuffle=True))]:
            part = distribute_loader(loader, rank=rank, world_size=WORLD, training=training, seed=3)
            parts: list[list[int]] = [[]] * WORLD
            dist.all_gather_object(parts, [i for _, indices in part for i in indices.tolist()])
            read = [index for indices in parts for index in indices]
            assert set(read) == set(range(23))
            assert len(read) == (24 if training else 23), "evaluation repeats nothing"
    finally:
        dist.destroy_process_group()
        time.sleep(0.1)  # gloo's threads need the GIL to drop what they hold, or the process aborts at its end


@pytest.mark.proves("13.11")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_two_processes_train_as_raw_ddp_does_and_evaluate_each_sample_once(tmp_path) -> None:
    mp.start_processes(on_a_rank, args=(str(tmp_path),), nprocs=WORLD, start_method="spawn")
