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
    WeightedRandomSampler,
)

from fulmen_data import (
    CombinedLoader,
    SeekableSampler,
    UnrepeatedDistributedSampler,
    distribute_loader,
    rebuild_loader,
    set_epoch,
    track_batch_indices,
)

# Python 3.12 warns whenever a process with threads forks, as every DataLoader with workers does.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

DATA = list(range(23))


def all_indices(loader: object) -> list[int]:
    return [index for batch in loader for index in torch.as_tensor(batch).tolist()]


def collate_twice(batch: list[int]) -> torch.Tensor:
    return torch.tensor([*batch, *batch])


@pytest.mark.proves("9.34")
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_batches_equal_those_of_a_loader_with_torchs_distributed_sampler(world, shuffle) -> None:
    for rank in range(world):
        ours = distribute_loader(
            DataLoader(DATA, 4), rank=rank, world_size=world, shuffle=shuffle, training=True, seed=0
        )
        theirs = DataLoader(DATA, 4, sampler=DistributedSampler(DATA, world, rank, shuffle=shuffle, seed=0))
        for epoch in range(3):
            set_epoch(ours, epoch)
            theirs.sampler.set_epoch(epoch)
            assert [b.tolist() for b in ours] == [b.tolist() for b in theirs]


@pytest.mark.proves("13.11")
@pytest.mark.parametrize("world", [2, 3, 8, 30])
@pytest.mark.parametrize("shuffled", [False, True])
def test_evaluation_reads_each_sample_exactly_once_over_ranks(world, shuffled) -> None:
    loaders = [
        distribute_loader(DataLoader(DATA, 4, shuffle=shuffled), rank=rank, world_size=world, training=False)
        for rank in range(world)
    ]
    assert sorted(index for loader in loaders for index in all_indices(loader)) == DATA
    assert all(loader.sampler.shuffle == shuffled for loader in loaders), "None follows the loader"


def test_a_request_to_shuffle_wins_over_the_loader_and_none_follows_it() -> None:
    def shuffles(loader: DataLoader, shuffle: bool | None) -> bool:
        return distribute_loader(loader, rank=0, world_size=2, shuffle=shuffle, training=True).sampler.shuffle

    assert shuffles(DataLoader(DATA), True)
    assert not shuffles(DataLoader(DATA, shuffle=True), False)
    assert shuffles(DataLoader(DATA, shuffle=True), None)
    assert not shuffles(DataLoader(DATA), None)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


def test_what_needs_no_splitting_is_handed_back_itself() -> None:
    own = DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0))
    in_batches = DataLoader(DATA, batch_sampler=BatchSampler(DistributedSampler(DATA, 2, 0), 2, False))
    batch_list = [1, 2, 3]
    for loader in (own, in_batches, DataLoader(Stream()), batch_list):
        assert distribute_loader(loader, rank=0, world_size=2, training=True) is loader
    plain = DataLoader(DATA)
    assert distribute_loader(plain, rank=0, world_size=1, training=True) is plain
    once = distribute_loader(plain, rank=0, world_size=2, training=True)
    assert distribute_loader(once, rank=0, world_size=2, training=True) is once


@pytest.mark.parametrize("training", [False, True])
def test_a_users_sampler_is_wrapped_and_never_dropped(training) -> None:
    chosen = [2, 3, 5, 7, 11, 13, 17]
    read = []
    for rank in range(2):
        loader = DataLoader(DATA, 2, sampler=chosen)
        part = distribute_loader(loader, rank=rank, world_size=2, shuffle=True, training=training)
        assert part.sampler.sampler is chosen
        read.append(all_indices(part))
    assert read[0] == [2, 5, 11, 17]
    assert read[1] == ([3, 7, 13, 2] if training else [3, 7, 13])


def test_a_random_sampler_with_replacement_counts_as_the_users_own() -> None:
    loader = DataLoader(DATA, 2, sampler=RandomSampler(DATA, replacement=True, num_samples=10))
    part = distribute_loader(loader, rank=1, world_size=2, training=True)
    assert len(all_indices(part)) == 5


def test_weights_keep_their_meaning_when_split() -> None:
    weights = [1.0 if index in (3, 4) else 0.0 for index in DATA]
    for rank in range(2):
        torch.manual_seed(rank)
        loader = DataLoader(DATA, 4, sampler=WeightedRandomSampler(weights, 40))
        part = all_indices(distribute_loader(loader, rank=rank, world_size=2, training=True))
        assert len(part) == 20
        assert set(part) == {3, 4}


class Buckets(Sampler[list[int]]):
    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self):
        return iter([[0, 1, 2], [3], [4, 5, 6, 7], [8, 9], [self.epoch]])

    def __len__(self) -> int:
        return 5

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_users_batch_sampler_keeps_its_batches() -> None:
    loaders = [
        distribute_loader(DataLoader(DATA, batch_sampler=Buckets()), rank=rank, world_size=2, training=False)
        for rank in range(2)
    ]
    for loader in loaders:
        set_epoch(loader, 21)
    assert [batch.tolist() for batch in loaders[0]] == [[0, 1, 2], [4, 5, 6, 7], [21]]
    assert [batch.tolist() for batch in loaders[1]] == [[3], [8, 9]]


def test_a_plain_batch_sampler_given_by_the_user_keeps_size_and_drop_last() -> None:
    for rank in range(2):
        loader = DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 5, drop_last=True))
        part = distribute_loader(loader, rank=rank, world_size=2, training=True)
        assert [len(batch) for batch in part] == [5, 5]
        assert isinstance(part.batch_sampler.sampler, SeekableSampler)


def test_every_setting_of_the_loader_survives() -> None:
    generator = torch.Generator()
    loader = DataLoader(
        DATA,
        3,
        num_workers=1,
        collate_fn=collate_twice,
        drop_last=True,
        timeout=30,
        worker_init_fn=print,
        multiprocessing_context="spawn",
        generator=generator,
        prefetch_factor=4,
        persistent_workers=True,
        in_order=False,
    )
    loader.remark = "set afterwards"

    part = distribute_loader(loader, rank=0, world_size=2, training=False)

    settings = vars(loader).keys() - {"sampler", "batch_sampler"}
    assert settings >= {"collate_fn", "generator", "prefetch_factor", "persistent_workers", "in_order", "remark"}
    for name in settings:
        assert getattr(part, name) == getattr(loader, name), name
    assert isinstance(part.sampler, UnrepeatedDistributedSampler)
    assert isinstance(loader.sampler, SequentialSampler), "the user's loader is not changed"


class Doubling(DataLoader):
    def __init__(self, data: Dataset, factor: int, *, offset: int = 0, **kwargs: object) -> None:
        super().__init__(data, **kwargs)
        self.factor = factor
        self._offset = offset

    def __iter__(self):
        for batch in super().__iter__():
            yield batch * self.factor + self._offset


class Fixed(DataLoader):
    """Decides some of DataLoader's arguments itself."""

    def __init__(self, data: Dataset, **kwargs: object) -> None:
        super().__init__(data, batch_size=6, drop_last=True, **kwargs)
        self.data = data


def test_a_subclass_is_made_again_from_its_own_attributes() -> None:
    class Grandchild(Doubling):
        """Adds nothing to __init__."""

    loader = Grandchild(DATA, 10, offset=1, batch_size=4)
    loader.data = DATA
    parts = [distribute_loader(loader, rank=rank, world_size=2, training=False) for rank in range(2)]
    assert all(type(part) is Grandchild for part in parts)
    assert sorted(index for part in parts for index in all_indices(part)) == [10 * i + 1 for i in DATA]


def test_a_subclass_that_fixes_arguments_keeps_them() -> None:
    part = distribute_loader(Fixed(DATA), rank=0, world_size=2, training=True)
    assert [len(batch) for batch in part] == [6, 6]


def test_a_subclass_that_cannot_be_made_again_is_told_what_is_missing() -> None:
    class Forgetful(DataLoader):
        def __init__(self, dataset: Dataset, secret: str, **kwargs: object) -> None:
            super().__init__(dataset, **kwargs)

    class Silent(DataLoader):
        def __init__(self, dataset: Dataset, mode: str = "a", **kwargs: object) -> None:
            super().__init__(dataset, **kwargs)

    class Closed(DataLoader):
        def __init__(self, dataset: Dataset) -> None:
            super().__init__(dataset, batch_size=2)

    class Stubborn(DataLoader):
        def __init__(self, dataset: Dataset, sampler: object = None) -> None:
            super().__init__(dataset, batch_size=2)

    class Strict(DataLoader):
        def __init__(self, dataset: Dataset, sampler: object = None, **kwargs: object) -> None:
            if sampler is not None:
                raise TypeError("no samplers here")
            super().__init__(dataset, **kwargs)

    cases = {
        Forgetful(DATA, "s"): "needs 'secret', which the loader has no attribute for. Store it as self.secret",
        Silent(DATA, mode="b"): "its __init__ may have been given 'mode'",
        Closed(DATA): "its __init__ takes no 'sampler'",
        Stubborn(DATA): "but uses",
        Strict(DATA): "no samplers here",
    }
    for loader, message in cases.items():
        with pytest.raises(TypeError, match=message) as caught:
            distribute_loader(loader, rank=0, world_size=2, training=True)
        told = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
        assert "use_distributed_sampler=False" in told


def test_predictions_can_be_put_in_order_by_the_indices_of_their_batches() -> None:
    loader, tracker = track_batch_indices(DataLoader(DATA, 5, shuffle=True))
    predictions = {}
    for number, batch in enumerate(loader):
        predictions.update(zip(tracker.seen_batch_indices[number], batch.tolist(), strict=True))
    assert predictions == {index: index for index in DATA}
    assert track_batch_indices(loader) == (loader, tracker), "once is enough"


def test_loaders_without_batches_of_indices_are_not_tracked() -> None:
    for loader in (DataLoader(Stream()), DataLoader(DATA, batch_size=None)):
        assert track_batch_indices(loader) == (loader, None)


def test_the_epoch_reaches_every_sampler_once() -> None:
    class Counting(DistributedSampler):
        calls = 0

        def set_epoch(self, epoch: int) -> None:
            self.calls += 1
            super().set_epoch(epoch)

    plain, inner = Counting(DATA, 2, 0), Counting(DATA, 2, 0)
    loaders = {
        "a": DataLoader(DATA, 2, sampler=plain),
        "b": [DataLoader(DATA, batch_sampler=BatchSampler(inner, 2, False))],
    }
    set_epoch(CombinedLoader(loaders), 7)
    assert (plain.epoch, plain.calls) == (7, 1)
    assert (inner.epoch, inner.calls) == (7, 1)
    set_epoch([1, 2], 3)


def test_rebuilding_keeps_the_loader_whole_with_the_given_sampler() -> None:
    loader = rebuild_loader(DataLoader(DATA, 4, shuffle=True), sampler=SequentialSampler(DATA))
    assert all_indices(loader) == DATA
    loader = rebuild_loader(DataLoader(DATA, batch_size=None), sampler=[4, 2])
    assert [int(item) for item in loader] == [4, 2]
