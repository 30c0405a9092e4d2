"""Iterable data that can say where they are, in the main process and in workers."""

import io
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fulmen_data import CombinedLoader, FastForward, LoaderPosition

# Python 3.12 warns whenever a process with threads forks, as every DataLoader with workers does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


class Stream(IterableDataset):
    """Numbers of this worker's part, each with a random draw; it knows its place, and counts what it read."""

    def __init__(self, size: int = 43, *, forgets_at_its_end: bool = False) -> None:
        self.size, self.at, self.start = size, 0, 0
        self.forgets = forgets_at_its_end
        self.reads = torch.zeros(size, dtype=torch.int64).share_memory_()

    def __iter__(self):
        self.at, self.start = self.start, 0
        return self.rest()

    def rest(self):
        worker = get_worker_info()
        which, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # Parts of unequal lengths, so that workers end at different times.
        mine = [n for n in range(self.size) if (n % 7) % parts == which]
        while self.at < len(mine):
            number = mine[self.at]
            self.at += 1
            self.reads[number] += 1
            yield float(number), torch.rand(1).item(), random.random(), float(np.random.rand())
        if self.forgets:
            self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state) -> None:
        self.start = self.at = state["at"]


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def as_rows(batches):
    return [torch.stack(batch).tolist() for batch in batches]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.proves("5.38")
@pytest.mark.parametrize("options", [{}, {"forgets_at_its_end": True}])
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("at", [0, 1, 4, 7, 99])
def test_an_iterable_dataset_with_a_state_goes_on_in_every_worker_with_its_draws(at, workers, options) -> None:
    def make() -> tuple[Stream, LoaderPosition]:
        data = Stream(**options)
        return data, LoaderPosition(DataLoader(data, 4, num_workers=workers))

    seed(1)
    _, whole = make()
    expected = as_rows(whole)
    seed(1)
    data, position = make()
    iterator = iter(position)
    before = as_rows(next(iterator) for _ in range(min(at, len(expected))))
    state = saved(position.state_dict())
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()
    read = {int(number) for batch in before for number in batch[0]}

    seed(2)
    data, resumed = make()
    resumed.load_state_dict(state)
    torch.set_rng_state(rng[0])
    random.setstate(rng[1])
    np.random.set_state(rng[2])
    after = as_rows(resumed)

    assert before + after == expected
    assert data.reads[list(read)].sum() == 0, "what was trained on is not read again"
    resumed.set_epoch(1)
    assert sorted(n for batch in as_rows(resumed) for n in batch[0]) == list(range(43)), "the next epoch is whole"


def test_an_iterable_dataset_can_be_stopped_and_resumed_again_and_again() -> None:
    def make() -> LoaderPosition:
        return LoaderPosition(DataLoader(Stream(), 3, num_workers=2))

    seed(5)
    expected = as_rows(make())
    seed(5)
    position, seen = make(), []
    iterator = iter(position)
    while len(seen) < len(expected):
        seen += as_rows([next(iterator)])
        state = saved(position.state_dict())
        del iterator
        position = make()
        position.load_state_dict(state)
        iterator = iter(position)
        assert saved(position.state_dict())["batches"] == len(seen)
    assert seen == expected
    assert list(iterator) == []


def test_an_iterable_dataset_is_not_resumed_with_another_number_of_workers() -> None:
    position = LoaderPosition(DataLoader(Stream(), 4, num_workers=2))
    next(iter(position))
    with pytest.raises(ValueError, match="Stream was saved with num_workers=2; this loader has num_workers=0") as info:
        LoaderPosition(DataLoader(Stream(), 4)).load_state_dict(position.state_dict())
    assert "Resume with 2" in str(info.value)


class SetsItsPart(IterableDataset):
    def __init__(self) -> None:
        self.first = 0

    def __iter__(self):
        return iter(range(self.first, self.first + 3))

    def state_dict(self):
        return {}

    def load_state_dict(self, state) -> None:
        pass


def test_a_worker_init_fn_that_sets_its_workers_part_reaches_the_dataset() -> None:
    def begin(worker: int) -> None:
        get_worker_info().dataset.first = 10 * worker

    position = LoaderPosition(DataLoader(SetsItsPart(), None, num_workers=2, worker_init_fn=begin))
    assert [int(n) for n in position] == [0, 10, 1, 11, 2, 12]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_that_were_read_ahead_but_not_used_come_again_with_the_same_draws(ahead, workers) -> None:
    def make() -> LoaderPosition:
        position = LoaderPosition(DataLoader(Stream(), 4, num_workers=workers))
        position.reads_ahead = True
        return position

    seed(1)
    expected = as_rows(make())
    seed(1)
    position = make()
    iterator = iter(position)
    read = as_rows(next(iterator) for _ in range(5))
    state = saved(position.state_dict(batches=5 - ahead))
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()

    seed(3)
    resumed = make()
    resumed.load_state_dict(state)
    torch.set_rng_state(rng[0])
    random.setstate(rng[1])
    np.random.set_state(rng[2])
    iterator = iter(resumed)
    assert resumed.batches == 5 - ahead
    assert torch.equal(torch.get_rng_state(), rng[0]), "reading them again leaves the generators alone"
    again = saved(resumed.state_dict())
    assert (again["batches"], again["ahead"]["batches"]) == (5 - ahead, ahead)
    assert str(again["loader"]) == str(state["loader"])
    assert as_rows(iterator) == expected[5 - ahead :]
    assert read == expected[:5]


class Endless:
    """Batches from nowhere."""

    def __iter__(self):
        return iter(torch.rand(3).item() for _ in range(10_000))


def test_reading_again_tells_how_long_it_will_take(caplog, monkeypatch) -> None:
    clock = iter(range(0, 10_000_000, 4))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    caplog.set_level("INFO", "fulmen_data")
    slow = FastForward([[n] for n in range(8)])
    iterator = iter(slow)
    for _ in range(6):
        next(iterator)
    resumed = FastForward([[n] for n in range(8)])
    resumed.load_state_dict(slow.state_dict())

    assert list(resumed) == [[6], [7]]
    assert "list: dropped 3 of 6 batches; about 12 s are left." in caplog.text
    assert list(resumed) == [[n] for n in range(8)], "the next epoch is whole"


def test_what_has_no_position_is_named_also_inside_a_combined_loader() -> None:
    class Plain(IterableDataset):
        def __iter__(self):
            return iter(range(9))

    assert LoaderPosition(DataLoader(Plain(), 2)).lost == "Plain"
    assert LoaderPosition(Endless()).lost == "Endless"
    assert LoaderPosition(FastForward(DataLoader(Plain(), 2))).lost is None
    for known in (DataLoader(Stream(), 2), DataLoader([1, 2], 1), [[1], [2]]):
        assert LoaderPosition(known).lost is None
    combined = LoaderPosition(CombinedLoader({"a": DataLoader(Plain(), 2), "b": DataLoader([1, 2], 1)}))
    assert [part.lost for part in combined.parts()] == ["Plain", None]


class Draws(Dataset):
    def __init__(self, draw) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        self.draw()
        return index


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: torch.rand(1), "Draws"),
        (random.random, "Draws"),
        (lambda: np.random.rand(), "Draws"),
        (lambda: None, None),
        (lambda: torch.rand(1, generator=torch.Generator().manual_seed(1)), None),
    ],
)
def test_a_dataset_that_draws_in_workers_is_named(draw, named) -> None:
    position = LoaderPosition(DataLoader(Draws(draw), 2, num_workers=2))
    assert position.draws is None, "nothing was read yet"
    assert len(list(position)) == 4
    assert position.draws == named


def test_a_worker_init_fn_that_seeds_is_no_draw_and_draws_in_the_main_process_are_restored() -> None:
    seeded = DataLoader(Draws(lambda: None), 2, num_workers=2, worker_init_fn=lambda worker: torch.manual_seed(worker))
    collate = seeded.collate_fn
    for loader in (seeded, DataLoader(Draws(lambda: torch.rand(1)), 2)):
        position = LoaderPosition(loader)
        list(position)
        assert position.draws is None
    assert seeded.collate_fn is collate, "the user's loader is as it was"
