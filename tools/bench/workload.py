"""The work that everyone does in a measurement: a tiny MLP on ready-made batches, and a clock inside its forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 32


class Clock:
    """Wall time of every step, and process CPU time of every 64th, read at the start of the model's forward.

    The reading costs everyone the same 0.3 µs; the CPU clock is a system call, hence the 64.
    """

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[tuple[int, float]] = []

    def __call__(self) -> None:
        self.wall_s.append(time.perf_counter())
        if not len(self.wall_s) & 63:
            self.cpu_s.append((len(self.wall_s), time.process_time()))

    def median_step_us(self, skip: int) -> float:
        """The median time between two steps after the first ``skip``: a neighbour's burst does not move it."""
        times = self.wall_s[skip:]
        steps = sorted(after - before for before, after in pairwise(times))
        return 1e6 * steps[len(steps) // 2]

    def mean_cpu_us(self, skip: int) -> float:
        """The mean CPU time of a step after the first ``skip``: it sees work that is done only now and then."""
        (first, start), *_, (last, end) = [reading for reading in self.cpu_s if reading[0] > skip]
        return 1e6 * (end - start) / (last - first)


class TinyMLP(nn.Module):
    """Linear, ReLU, Linear; calls ``tick`` once a forward."""

    def __init__(self, tick: Callable[[], None]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        self.tick = tick

    def forward(self, x: Tensor) -> Tensor:
        self.tick()
        return self.layers(x)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Random batches made beforehand; whole batches are slices, so that the loader's own cost is small and equal."""

    def __init__(self, batches: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batches * BATCH_SIZE, 32, generator=generator)
        self.y = torch.randint(0, 10, (batches * BATCH_SIZE,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        first, end = indices[0], indices[-1] + 1
        return self.x[first:end], self.y[first:end]


def as_it_is(batch: object) -> object:
    """The collate function of data that comes in batches."""
    return batch


class Cycle:
    """A sampler that walks ``distinct`` batches again and again, for runs whose data must not grow with them."""

    def __init__(self, distinct: int, batches: int) -> None:
        self.distinct, self.batches = distinct, batches

    def __len__(self) -> int:
        return self.batches * BATCH_SIZE

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.batches, self.distinct):
            yield from range(min(self.distinct, self.batches - start) * BATCH_SIZE)


_made: dict[int, Batches] = {}


def loader(batches: int, distinct: int | None = None) -> DataLoader[tuple[Tensor, Tensor]]:
    """A DataLoader of ``batches`` batches, of which ``distinct`` are different (all, if not given)."""
    count = distinct or batches
    data = _made.setdefault(count, Batches(count))
    sampler = Cycle(count, batches) if distinct else None
    return DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler, collate_fn=as_it_is)  # type: ignore[arg-type]
