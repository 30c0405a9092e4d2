"""An epoch that goes on on another number of ranks: every sample once, counted by its index."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from fulmen_data import (
    DistributedBatchSampler,
    LoaderPosition,
    batches_left,
    distribute_loader,
    elastic_loader,
    needs_elastic_loader,
)

WORLDS = [1, 2, 3, 4, 8]


class Indices(Dataset):
    def __init__(self, size: int) -> None:
        self.size, self.reads = size, Counter()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.reads[index] += 1
        return index


class Run:
    """All ranks of a data-parallel run, in one process, as the Trainer sets them up."""

    def __init__(self, make, ranks: int, seed: int, epoch: int) -> None:
        self.ranks, self.positions = ranks, []
        self.users = [make() for _ in range(ranks)]
        for rank, user in enumerate(self.users):
            loader = distribute_loader(user, rank=rank, world_size=ranks, training=True, seed=seed)
            self.positions.append(LoaderPosition(loader))
            self.positions[-1].set_epoch(epoch)

    def resume(self, state: dict, saved_ranks: int) -> None:
        for rank, user in enumerate(self.users):
            position, mine = self.positions[rank], state
            if needs_elastic_loader(position.loader, state, saved_ranks=saved_ranks, ranks=self.ranks):
                loader, mine = elastic_loader(user, state, rank=rank, ranks=self.ranks, saved_ranks=saved_ranks)
                replayed = mine if "replayed" in mine["order"] else None
                position = self.positions[rank] = LoaderPosition(loader, replayed=replayed)
            position.load_state_dict(mine)

    def train(self, batches: int | None = None) -> tuple[list[int], bool, dict]:
        """Read so many batches on each rank, or all; what was read in order, whether that was all, the position."""
        iterators = [iter(position) for position in self.positions]
        rounds: list[list[int]] = []
        ended = False
        while batches is None or len(rounds) < batches:
            steps = [next(iterator, None) for iterator in iterators]
            if all(step is None for step in steps):
                ended = True
                break
            assert all(step is not None for step in steps), "ranks have equally many batches"
            assert len({len(step) for step in steps}) == 1, "of equal sizes"
            # The order of a round over ranks: sample 0 of each rank, sample 1 of each rank, ...; or whole batches.
            by_sample = [int(step[i]) for i in range(len(steps[0])) for step in steps]
            whole = isinstance(getattr(self.positions[0].loader, "batch_sampler", None), DistributedBatchSampler)
            rounds.append([int(index) for step in steps for index in step] if whole else by_sample)
        states = [position.state_dict() for position in self.positions]
        assert len({str(state["samples"]) for state in states}) == 1
        return [index for part in rounds for index in part], ended, states[0]


def ledger(make, worlds, stops, *, seed: int, epoch: int) -> list[int]:
    """All that was read in one epoch of a run that was stopped after ``stops`` batches and went on on ``worlds``."""
    torch.manual_seed(seed)
    read, state, before = [], None, 0
    for world, stop in zip(worlds, [*stops, None], strict=True):
        run = Run(make, world, seed, epoch)
        if state is not None:
            run.resume(state, before)
        part, ended, state = run.train(stop)
        before = world
        read += part
        if ended:
            break
    return read


def check(read: list[int], size: int, last_world_extra: int) -> None:
    counts = Counter(read)
    assert set(counts) == set(range(size)), "every sample was seen"
    assert len(read) - size <= last_world_extra, "and only the padding that makes ranks equal is seen again"
    assert len(read[:size]) == len(set(read[:size])), "the padding comes last"


@pytest.mark.proves("5.38")
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_over_any_sequence_of_world_sizes_every_sample_is_seen_once_in_the_order_of_the_unbroken_run(data) -> None:
    size = data.draw(st.integers(1, 200), "size")
    batch = data.draw(st.integers(1, 7), "batch")
    worlds = data.draw(st.lists(st.sampled_from(WORLDS), min_size=1, max_size=6), "worlds")
    stops = data.draw(st.lists(st.integers(0, 9), min_size=len(worlds) - 1, max_size=len(worlds) - 1), "stops")
    seed, epoch = data.draw(st.integers(0, 5), "seed"), data.draw(st.integers(0, 3), "epoch")

    def make() -> DataLoader:
        return DataLoader(Indices(size), batch, shuffle=True)

    read = ledger(make, worlds, stops, seed=seed, epoch=epoch)

    check(read, size, max(worlds) - 1)
    torch.manual_seed(seed)
    unbroken = ledger(make, worlds[:1], [], seed=seed, epoch=epoch)
    assert read[:size] == unbroken[:size]


class Buckets(Sampler[list[int]]):
    """A user's batch sampler, of unequal batches."""

    def __iter__(self):
        order = torch.randperm(30).tolist()
        return iter([order[i : i + 2] for i in range(0, 30, 2)])

    def __len__(self) -> int:
        return 15


LOADERS = {
    "sequential": lambda: DataLoader(Indices(30), 2),
    "own generator": lambda: DataLoader(Indices(30), 2, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "batch sampler of torch": lambda: DataLoader(
        Indices(30), batch_sampler=BatchSampler(RandomSampler(Indices(30)), 2, drop_last=False)
    ),
    "user's sampler": lambda: DataLoader(
        Indices(30), 2, sampler=WeightedRandomSampler([1.0] * 30, 30, replacement=False)
    ),
    "user's batch sampler": lambda: DataLoader(Indices(30), batch_sampler=Buckets()),
}


@pytest.mark.parametrize("worlds", [(4, 1), (1, 4), (4, 2), (2, 3), (1, 3, 1), (1, 2, 2), (3, 1, 1, 8), (8, 4, 2, 1)])
@pytest.mark.parametrize("kind", LOADERS)
def test_every_kind_of_order_goes_on_on_another_number_of_ranks(kind, worlds) -> None:
    stops = [1] * (len(worlds) - 1)
    read = ledger(LOADERS[kind], worlds, stops, seed=3, epoch=2)
    spare = (max(worlds) - 1) * (2 if kind == "user's batch sampler" else 1)
    check(read, 30, spare)


def test_resuming_reads_no_sample_that_was_read_before() -> None:
    run = Run(lambda: DataLoader(Indices(32), 2, shuffle=True), 4, 0, 1)
    before, _, state = run.train(2)
    after = Run(lambda: DataLoader(Indices(32), 2, shuffle=True), 2, 0, 1)
    after.resume(state, 4)
    after.train()
    reads = sum((user.dataset.reads for user in after.users), Counter())
    assert set(reads) == set(range(32)) - set(before)


def test_the_saved_seed_decides_the_rest_of_the_order() -> None:
    run = Run(lambda: DataLoader(Indices(32), 2, shuffle=True), 4, 5, 1)
    before, _, state = run.train(2)
    other = Run(lambda: DataLoader(Indices(32), 2, shuffle=True), 2, 99, 1)
    other.resume(state, 4)
    after, _, _ = other.train()
    assert sorted(before + after) == list(range(32))


@pytest.mark.parametrize(("ranks", "drop"), [(1, False), (2, False), (3, True), (8, False)])
def test_the_number_of_batches_that_are_left_is_known(ranks, drop) -> None:
    run = Run(lambda: DataLoader(Indices(50), 3, shuffle=True, drop_last=drop), 4, 0, 0)
    _, _, state = run.train(2)
    other = Run(lambda: DataLoader(Indices(50), 3, shuffle=True, drop_last=drop), ranks, 0, 0)
    other.resume(state, 4)
    left = {batches_left(position.loader, state) for position in other.positions}
    assert left == {len(list(position)) for position in other.positions}
    assert batches_left(DataLoader(Indices(5), 2), {"samples": None}) is None


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(9))

    def state_dict(self):
        return {}

    def load_state_dict(self, state) -> None:
        pass


def test_an_order_that_each_rank_makes_by_itself_is_refused() -> None:
    own = DataLoader(Indices(8), 2, sampler=DistributedSampler(Indices(8), 2, 0))
    for loader, what in ((own, "DistributedSampler"), (DataLoader(Stream(), 2), "Stream")):
        position = LoaderPosition(loader)
        next(iter(position))
        state = position.state_dict()
        assert needs_elastic_loader(loader, state, saved_ranks=2, ranks=3)
        with pytest.raises(ValueError, match=rf"saved .* by 2 ranks and is loaded on 3; {what} decides") as info:
            elastic_loader(loader, state, rank=0, ranks=3, saved_ranks=2)
        assert "Resume on 2 ranks, or from a checkpoint of an epoch's end" in str(info.value)
