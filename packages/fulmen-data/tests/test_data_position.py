import io
import itertools
import random
import sys
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fulmen_data import (
    CombinedLoader,
    DistributedBatchSampler,
    DistributedSamplerWrapper,
    FastForward,
    LoaderPosition,
    SeekableSampler,
)

# Python 3.12 warns whenever a process with threads forks, as every DataLoader with workers does.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

SIZE = 37


class Numbers(Dataset):
    """Counts, in memory that workers share, how often each sample is read."""

    def __init__(self, size: int = SIZE) -> None:
        self.reads = torch.zeros(size, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> int:
        self.reads[index] += 1
        return index


class NumpySampler(Sampler[int]):
    """A user's sampler that shuffles with NumPy's and Python's global generators."""

    def __iter__(self):
        order = np.random.permutation(SIZE).tolist()
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SIZE


class Buckets(Sampler[list[int]]):
    """A user's batch sampler: batches of unequal sizes in random order."""

    def __iter__(self):
        order = torch.randperm(SIZE).tolist()
        cuts = [0, 3, 4, 9, 15, 16, 22, 30, SIZE]
        return iter([order[a:b] for a, b in itertools.pairwise(cuts)])

    def __len__(self) -> int:
        return 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shared_generator(data: Dataset, **options: object) -> DataLoader:
    generator = seeded(5)
    sampler = RandomSampler(data, num_samples=2 * SIZE + 3, generator=generator)
    return DataLoader(data, 4, sampler=sampler, generator=generator, **options)


LOADERS = {
    "sequential": lambda data, **o: DataLoader(data, 4, **o),
    "shuffled": lambda data, **o: DataLoader(data, 4, shuffle=True, **o),
    "own generator": lambda data, **o: DataLoader(data, 4, shuffle=True, generator=seeded(7), **o),
    "shared generator, several passes": shared_generator,
    "sampler with a generator": lambda data, **o: DataLoader(
        data, 4, sampler=RandomSampler(data, replacement=True, num_samples=90, generator=seeded(3)), **o
    ),
    "replacement": lambda data, **o: DataLoader(
        data, 4, sampler=RandomSampler(data, replacement=True, num_samples=90), **o
    ),
    "weighted": lambda data, **o: DataLoader(
        data, 4, sampler=WeightedRandomSampler([1.0 + i for i in range(SIZE)], 40), **o
    ),
    "subset": lambda data, **o: DataLoader(data, 4, sampler=SubsetRandomSampler(range(5, 36)), **o),
    "numpy and python": lambda data, **o: DataLoader(data, 4, sampler=NumpySampler(), drop_last=True, **o),
    "batch sampler": lambda data, **o: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data), 5, drop_last=False), **o
    ),
    "buckets": lambda data, **o: DataLoader(data, batch_sampler=Buckets(), **o),
    "no batching": lambda data, **o: DataLoader(data, batch_size=None, shuffle=True, **o),
    "split": lambda data, **o: DataLoader(
        data, 4, sampler=DistributedSamplerWrapper(WeightedRandomSampler([1.0] * SIZE, 60), 2, 1), **o
    ),
    "dealt": lambda data, **o: DataLoader(data, batch_sampler=DistributedBatchSampler(Buckets(), 2, 0, pad=True), **o),
    "torch's distributed": lambda data, **o: DataLoader(data, 4, sampler=DistributedSampler(data, 2, 1), **o),
    "seekable": lambda data, **o: DataLoader(data, 4, sampler=SeekableSampler(data, seed=3), **o),
}


def checkpoint(position: LoaderPosition) -> bytes:
    state = {
        "position": position.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "numpy at": np.random.get_state()[2],
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def train(position: LoaderPosition, epochs: int, stop: tuple[int, int] | None = None):
    """What a training loop sees: batches, and the random numbers it draws itself in between."""
    seen, saved = [], None
    for epoch in range(position.epoch, epochs):
        position.set_epoch(epoch)
        iterator = iter(position)
        if (epoch, 0) == stop and not position.batches:
            return seen, checkpoint(position)
        for batch in iterator:
            seen.append(
                (epoch, torch.as_tensor(batch).tolist(), torch.rand(1).item(), random.random(), float(np.random.rand()))
            )
            if (epoch, position.batches) == stop:
                saved = checkpoint(position)
                return seen, saved
    return seen, saved


def run(make, options, stop):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    whole, _ = train(LoaderPosition(make(Numbers(), **options)), 3)

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before, saved = train(LoaderPosition(make(Numbers(), **options)), 3, stop)

    # Another process: new objects, another random state, then the checkpoint.
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    data = Numbers()
    position = LoaderPosition(make(data, **options))
    state = torch.load(io.BytesIO(saved), weights_only=True)
    position.load_state_dict(state["position"])
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(("MT19937", state["numpy"], state["numpy at"]))
    iterator_reads = data.reads.sum().item()
    after, _ = train(position, 3)
    return whole, before, after, data, iterator_reads


@pytest.mark.proves("5.38")
@pytest.mark.parametrize("stop", [(0, 0), (0, 1), (0, 4), (1, 3)])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_run_sees_the_batches_and_random_numbers_of_the_uninterrupted_one(kind, stop) -> None:
    whole, before, after, data, _ = run(LOADERS[kind], {}, stop)

    assert before + after == whole
    in_batches = [index for _, batch, *_ in after for index in ([batch] if isinstance(batch, int) else batch)]
    expected = torch.bincount(torch.tensor(in_batches), minlength=SIZE)
    assert torch.equal(data.reads, expected), "skipped samples are not read"


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stop", [(0, 0), (0, 3), (1, 3)])
@pytest.mark.parametrize("kind", ["shuffled", "shared generator, several passes", "weighted", "buckets", "seekable"])
def test_a_run_with_two_workers_resumes_exactly(kind, stop, persistent) -> None:
    options = {"num_workers": 2, "persistent_workers": persistent}
    whole, before, after, data, _ = run(LOADERS[kind], options, stop)

    assert before + after == whole
    in_batches = [index for _, batch, *_ in after for index in batch]
    assert torch.equal(data.reads, torch.bincount(torch.tensor(in_batches), minlength=SIZE))


class WorkerSeeds(Numbers):
    def __getitem__(self, index: int) -> int:
        return torch.utils.data.get_worker_info().seed - torch.utils.data.get_worker_info().id


@pytest.mark.parametrize("generator", [None, 4])
def test_workers_get_the_seed_that_they_had_before_the_stop(generator) -> None:
    def make() -> LoaderPosition:
        own = None if generator is None else seeded(generator)
        return LoaderPosition(DataLoader(WorkerSeeds(), 4, shuffle=True, num_workers=2, generator=own))

    torch.manual_seed(6)
    position = make()
    before = next(iter(position)).tolist()

    torch.manual_seed(7)
    resumed = make()
    resumed.load_state_dict(position.state_dict())

    assert {seed for batch in resumed for seed in batch.tolist()} == set(before)


def test_a_run_can_be_stopped_and_resumed_again_and_again() -> None:
    torch.manual_seed(2)
    whole, _ = train(LoaderPosition(LOADERS["shuffled"](Numbers())), 2)

    torch.manual_seed(2)
    seen, saved = train(LoaderPosition(LOADERS["shuffled"](Numbers())), 2, (0, 2))
    for stop in [(0, 3), (0, 9), (1, 1), (1, 4), None]:
        position = LoaderPosition(LOADERS["shuffled"](Numbers()))
        state = torch.load(io.BytesIO(saved), weights_only=True)
        position.load_state_dict(state["position"])
        torch.set_rng_state(state["torch"])
        more, saved = train(position, 2, stop)
        seen += more
    assert [row[:3] for row in seen] == [row[:3] for row in whole]


def test_iterating_gives_the_loaders_own_iterator_so_that_a_batch_costs_nothing() -> None:
    loader = DataLoader(Numbers(), 4)
    position = LoaderPosition(loader)
    assert type(iter(position)) is type(iter(loader))
    assert len(position) == len(loader) == 10


def test_the_number_of_batches_may_be_given_by_who_reads_ahead() -> None:
    position = LoaderPosition(DataLoader(Numbers(), 4))
    iterator = iter(position)
    for _ in range(5):
        next(iterator)
    assert position.batches == 5

    resumed = LoaderPosition(DataLoader(Numbers(), 4))
    resumed.load_state_dict(position.state_dict(batches=3))

    assert resumed.batches == 3
    assert next(iter(resumed)).tolist() == [12, 13, 14, 15]
    assert resumed.batches == 4


def test_a_position_at_the_end_of_an_epoch_has_no_batch_left_and_the_next_epoch_is_whole() -> None:
    position = LoaderPosition(DataLoader(Numbers(), 4))
    for _ in position:
        pass
    resumed = LoaderPosition(DataLoader(Numbers(), 4))
    resumed.load_state_dict(position.state_dict())
    resumed.set_epoch(0)
    assert list(resumed) == []
    resumed.set_epoch(1)
    assert len(list(resumed)) == 10


@pytest.mark.parametrize("sampler", [RandomSampler, SeekableSampler])
def test_a_pending_position_can_be_saved_again_before_it_is_used(sampler) -> None:
    def make() -> LoaderPosition:
        data = Numbers()
        return LoaderPosition(DataLoader(data, 4, sampler=sampler(data)))

    torch.manual_seed(0)
    position = make()
    whole = [batch.tolist() for batch in position]
    torch.manual_seed(9)
    pending = make()
    pending.load_state_dict(position.state_dict(batches=3))
    for state, done in [(pending.state_dict(), 3), (pending.state_dict(3), 3), (pending.state_dict(5), 5)]:
        resumed = make()
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == whole[done:]


def test_another_epoch_or_restart_drops_the_position() -> None:
    position = LoaderPosition(DataLoader(Numbers(), 4))
    next(iter(position))
    state = position.state_dict()
    for drop in (lambda p: p.set_epoch(1), lambda p: p.restart()):
        resumed = LoaderPosition(DataLoader(Numbers(), 4))
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state, "asked before iter, the pending position is given"
        drop(resumed)
        assert resumed.batches == 0
        assert len(list(resumed)) == 10


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_position_reached_on_four_ranks_goes_on_on_another_number_of_ranks(ranks) -> None:
    def loader(rank: int, world: int) -> LoaderPosition:
        data = Numbers(64)
        return LoaderPosition(DataLoader(data, 4, sampler=SeekableSampler(data, world, rank, seed=1)))

    read, states = [], []
    for rank in range(4):
        position = loader(rank, 4)
        position.set_epoch(2)
        iterator = iter(position)
        for _ in range(3):
            read += next(iterator).tolist()
        states.append(position.state_dict())
    assert all(state["samples"] == 48 for state in states)

    for rank in range(ranks):
        position = loader(rank, ranks)
        position.load_state_dict(states[0])
        part = [index for batch in position for index in batch.tolist()]
        assert position.state_dict()["samples"] >= 64 - (64 % ranks)
        read += part if len(set(read) & set(part)) == 0 else part[:-1]  # the padding repeats the first samples

    assert sorted(read) == list(range(64))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(SIZE))


@pytest.mark.proves("5.38")
def test_an_iterable_dataset_without_a_state_is_named_and_begins_again_after_a_resume(caplog) -> None:
    position = LoaderPosition(DataLoader(Stream(), 4))
    iterator = iter(position)
    for _ in range(3):
        next(iterator)
    assert position.lost == "Stream"
    resumed = LoaderPosition(DataLoader(Stream(), 4))
    resumed.load_state_dict(position.state_dict())
    assert next(iter(resumed)).tolist() == [0, 1, 2, 3]
    assert resumed.batches == 4
    assert "Stream has no position: the epoch goes on at batch 3" in caplog.text


def test_an_iterable_dataset_is_read_again_up_to_the_position_where_that_is_asked_for(caplog) -> None:
    caplog.set_level("INFO")
    position = LoaderPosition(FastForward(DataLoader(Stream(), 4)))
    iterator = iter(position)
    for _ in range(3):
        next(iterator)
    assert position.lost is None
    resumed = LoaderPosition(FastForward(DataLoader(Stream(), 4)))
    resumed.load_state_dict(position.state_dict())
    assert next(iter(resumed)).tolist() == [12, 13, 14, 15]
    assert resumed.batches == 4
    assert "reading and dropping 3 batches" in caplog.text


def test_any_iterable_of_batches_has_a_position() -> None:
    position = LoaderPosition(["a", "b", "c"])
    assert next(iter(position)) == "a"
    resumed = LoaderPosition(["a", "b", "c"])
    resumed.load_state_dict(position.state_dict())
    assert list(resumed) == ["b", "c"]
    assert resumed.batches == 3


class OwnState:
    """As torchdata's StatefulDataLoader: knows its own position."""

    def __init__(self) -> None:
        self.start = self.at = 0

    def __iter__(self):
        self.at, self.start = self.start, 0
        return self.rest()

    def rest(self):
        while self.at < 5:
            self.at += 1
            yield self.at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state) -> None:
        self.start = self.at = state["at"]


@pytest.mark.proves("5.38")
def test_a_loader_with_a_state_of_its_own_is_saved_and_restored_by_it() -> None:
    position = LoaderPosition(OwnState())
    iterator = iter(position)
    next(iterator), next(iterator)
    state = position.state_dict()
    assert state["loader"] == {"at": 2}

    resumed = LoaderPosition(OwnState())
    resumed.load_state_dict(state)

    assert resumed.batches == 2
    assert list(resumed) == [3, 4, 5]
    assert resumed.batches == 5
    with pytest.raises(ValueError, match="had a state of its own; list has none"):
        LoaderPosition([1]).load_state_dict(state)
    with pytest.raises(ValueError, match="had none of its own; OwnState has one"):
        LoaderPosition(OwnState()).load_state_dict(LoaderPosition([1]).state_dict())


def test_a_loader_of_another_length_is_named_when_its_position_is_loaded(caplog) -> None:
    state = LoaderPosition(DataLoader(Numbers(), 4)).state_dict()
    LoaderPosition(DataLoader(Numbers(), 5)).load_state_dict(state)
    assert "had 10 batches when its position was saved and has 8 now" in caplog.text


class CountingLoader(DataLoader):
    """A user's subclass with an argument and an iteration of its own."""

    def __init__(self, data: Dataset, note: str, **kwargs: object) -> None:
        super().__init__(data, **kwargs)
        self.secret = note

    def __iter__(self):
        for batch in super().__iter__():
            yield batch, self.secret


def test_a_subclass_of_dataloader_resumes_though_it_could_not_be_rebuilt() -> None:
    def make() -> LoaderPosition:
        return LoaderPosition(CountingLoader(Numbers(), "x", batch_size=4, shuffle=True, generator=seeded(3)))

    whole = [(batch.tolist(), note) for batch, note in make()]
    position = make()
    iterator = iter(position)
    for _ in range(4):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(position.state_dict())
    assert [(batch.tolist(), note) for batch, note in resumed] == whole[4:]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size", "sequential"])
@pytest.mark.parametrize("limits", [None, 4])
@pytest.mark.parametrize("at", [0, 1, 3, 5, 7])
def test_a_combined_loader_resumes_in_the_middle_in_every_mode(mode, limits, at) -> None:
    def make() -> LoaderPosition:
        loaders = {
            "a": DataLoader(Numbers(10), 4, shuffle=True, generator=seeded(1)),
            "b": DataLoader(Numbers(33), 4, shuffle=True, generator=seeded(2)),
            "c": OwnState(),
        }
        combined = CombinedLoader(loaders, mode)
        combined.limits = limits
        return LoaderPosition(combined)

    torch.manual_seed(0)
    whole = [str(item) for item in make()]
    torch.manual_seed(0)
    position = make()
    iterator = iter(position)
    before = [str(next(iterator)) for _ in range(min(at, len(whole)))]
    state = position.state_dict()
    rng = torch.get_rng_state()

    resumed = make()
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    after = [str(item) for item in resumed]

    assert before + after == whole
    assert len([str(item) for item in resumed]) == len(whole), "the next pass is whole"


def test_a_combined_position_is_not_taken_for_another_combination() -> None:
    state = CombinedLoader([[1, 2], [3]], "min_size").state_dict()
    with pytest.raises(ValueError, match="Combine the same loaders"):
        CombinedLoader([[1, 2], [3]], "max_size").load_state_dict(state)
    with pytest.raises(ValueError, match="of 2 loaders"):
        CombinedLoader([[1, 2]], "min_size").load_state_dict(state)


def test_sequential_order_of_plain_samplers_is_untouched_by_a_position() -> None:
    data = Numbers()
    loader = DataLoader(data, 4, sampler=SequentialSampler(data))
    assert [b.tolist() for b in LoaderPosition(loader)] == [b.tolist() for b in loader]


class Million(Numbers):
    """Eight million samples that take no memory; those that are read are counted."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 8_000_080

    def __getitem__(self, index: int) -> int:
        self.read += 1
        return index


@pytest.mark.proves("5.38")
@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        (lambda data: {"shuffle": True}, 8),
        (lambda data: {"shuffle": False}, 8),
        (lambda data: {"sampler": RandomSampler(data, generator=seeded(3))}, 8),
        (lambda data: {"sampler": SeekableSampler(data)}, 8),
        (lambda data: {"sampler": SeekableSampler(data, 2, 1, shuffle=False)}, 4),
        (lambda data: {"shuffle": True}, None),
    ],
    ids=["shuffled", "in order", "own generator", "seekable", "second of two ranks", "no batches"],
)
def test_going_on_at_batch_one_million_costs_as_many_calls_and_objects_as_at_batch_one(kind, batch) -> None:
    def first_batch_after(skipped: int):
        data = Million()
        torch.manual_seed(5)
        position = LoaderPosition(DataLoader(data, batch, **kind(data)))
        iter(position)
        state = position.state_dict(skipped)
        data.read, calls = 0, 0

        def count(frame, event, argument) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        position = LoaderPosition(DataLoader(data, batch, **kind(data)))
        position.load_state_dict(state)
        tracemalloc.start()
        sys.setprofile(count)
        try:
            found = next(iter(position))
        finally:
            sys.setprofile(None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found, data.read, calls, peak

    at = 8_000_000 if batch is None else 1_000_000
    _, _, few_calls, _ = first_batch_after(1)
    found, read, calls, peak = first_batch_after(at)
    assert read == (batch or 1), "a skipped sample is read"
    assert calls <= few_calls + 5, "something is called for each skipped sample"
    assert peak < 3_000_000, "each skipped index becomes an object of 32 bytes"

    torch.manual_seed(5)
    data = Million()
    sampler = iter(DataLoader(data, batch, **kind(data)).sampler)
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_()  # the workers' seed, which torch draws before a sampler's first index
    size = batch or 1
    expected = list(islice(sampler, at * size, (at + 1) * size))
    assert found.tolist() == expected if batch else found == expected[0]
