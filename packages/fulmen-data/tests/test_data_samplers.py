import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from fulmen_data import (
    DistributedBatchSampler,
    DistributedSamplerWrapper,
    IndexBatchSamplerWrapper,
    SeekableSampler,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)


@pytest.mark.proves("13.11")
@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluation_samplers_give_every_sample_exactly_once_for_all_sizes_and_ranks(shuffle) -> None:
    for size in range(1, 51):
        for ranks in range(1, 9):
            parts = [
                list(UnrepeatedDistributedSampler(range(size), ranks, rank, shuffle=shuffle, seed=4))
                for rank in range(ranks)
            ]
            samplers = [UnrepeatedDistributedSampler(range(size), ranks, rank) for rank in range(ranks)]
            assert sorted(index for part in parts for index in part) == list(range(size))
            assert [len(part) for part in parts] == [len(sampler) for sampler in samplers]
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_order_without_shuffling_is_the_data_sets_when_ranks_are_interleaved() -> None:
    parts = [list(UnrepeatedDistributedSampler(range(7), 3, rank)) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.proves("13.11")
@given(
    size=st.integers(1, 60),
    ranks=st.integers(1, 8),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 30),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_the_training_order_is_torchs_distributed_sampler_bit_for_bit(
    size, ranks, seed, epoch, shuffle, drop_last
) -> None:
    for rank in range(ranks):
        ours = SeekableSampler(range(size), ranks, rank, shuffle, seed, drop_last)
        theirs = DistributedSampler(range(size), ranks, rank, shuffle, seed, drop_last)
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


@given(
    size=st.integers(1, 60),
    ranks=st.integers(1, 8),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_seeking_gives_the_rest_of_the_whole_order(size, ranks, shuffle, drop_last, data) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    sampler = SeekableSampler(range(size), ranks, rank, shuffle, 3, drop_last)
    whole = list(sampler)
    done = data.draw(st.integers(0, len(whole)))

    iterator = iter(sampler)
    for _ in range(done):
        next(iterator)
    fresh = SeekableSampler(range(size), ranks, rank, shuffle, 3, drop_last)
    fresh.load_state_dict(sampler.state_dict())

    assert list(fresh) == whole[done:]
    assert list(fresh) == whole, "only one iteration starts late"


@given(size=st.integers(1, 80), before=st.integers(1, 8), after=st.integers(1, 8), steps=st.integers(0, 10))
@settings(deadline=None, max_examples=60)
def test_going_on_with_other_ranks_leaves_no_sample_out_and_repeats_only_the_padding(
    size, before, after, steps
) -> None:
    first = [SeekableSampler(range(size), before, rank, seed=1) for rank in range(before)]
    steps = min(steps, size // before)  # stopped before the padding
    read = [index for sampler in first for _, index in zip(range(steps), sampler, strict=False)]

    second = [SeekableSampler(range(size), after, rank, seed=1) for rank in range(after)]
    for sampler in second:
        sampler.seek(steps * before)
    rest = [list(sampler) for sampler in second]

    assert set(read) | {index for part in rest for index in part} == set(range(size))
    assert len({len(part) for part in rest}) == 1
    assert len(read) + sum(map(len, rest)) - size < after


def test_a_state_of_another_order_is_refused() -> None:
    state = SeekableSampler(range(10), seed=1).state_dict()
    with pytest.raises(ValueError, match="seed=1, this sampler 2"):
        SeekableSampler(range(10), seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="size=10, this sampler 11"):
        SeekableSampler(range(11), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="counts samples from 0"):
        SeekableSampler(range(10)).seek(-1)


def test_another_epoch_forgets_the_position() -> None:
    sampler = SeekableSampler(range(10))
    sampler.seek(4)
    sampler.set_epoch(0)
    assert sampler.state_dict()["position"] == 4
    sampler.set_epoch(1)
    assert len(list(sampler)) == 10


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_random_sampler_is_split_though_ranks_have_different_random_states(ranks) -> None:
    parts, orders = [], []
    for rank in range(ranks):
        torch.manual_seed(100 + rank)
        state = torch.get_rng_state()
        inner = WeightedRandomSampler([1.0] * 20, 20, replacement=False)
        sampler = UnrepeatedDistributedSamplerWrapper(inner, ranks, rank, seed=5)
        parts.append(list(sampler))
        assert torch.equal(state, torch.get_rng_state()), "splitting draws nothing from the run's own generator"
        sampler.set_epoch(1)
        orders.append(list(sampler))
    assert sorted(index for part in parts for index in part) == list(range(20))
    assert sorted(index for part in orders for index in part) == list(range(20))
    assert parts != orders, "each epoch has an order of its own"


def test_a_sampler_that_shuffles_with_python_or_numpy_is_split_in_agreement() -> None:
    class Shuffled:
        def __len__(self) -> int:
            return 20

        def __iter__(self):
            order = np.random.permutation(20).tolist()
            random.shuffle(order)
            return iter(order)

    parts = []
    for rank in range(2):
        random.seed(rank)
        np.random.seed(rank)
        parts += list(UnrepeatedDistributedSamplerWrapper(Shuffled(), 2, rank))
    assert sorted(parts) == list(range(20))


def test_the_wrapper_keeps_the_order_of_the_users_sampler_and_pads_for_training() -> None:
    order = [5, 3, 9, 1, 7]
    parts = [list(DistributedSamplerWrapper(order, 2, rank)) for rank in range(2)]
    assert parts == [[5, 9, 7], [3, 1, 5]]


def test_the_wrapper_tells_the_epoch_to_the_users_sampler() -> None:
    class Curriculum:
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 4

        def __iter__(self):
            return iter(range(self.epoch * 10, self.epoch * 10 + 4))

    for kind in (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper):
        sampler = kind(Curriculum(), 2, 1)
        sampler.set_epoch(3)
        assert list(sampler) == [31, 33]


def test_a_sampler_without_or_with_a_wrong_length_is_refused() -> None:
    with pytest.raises(TypeError, match="generator has no length, so it cannot be split"):
        DistributedSamplerWrapper(iter(i for i in range(3)), 2, 0)

    class Liar:
        def __len__(self) -> int:
            return 4

        def __iter__(self):
            return iter(range(3))

    with pytest.raises(ValueError, match="says its length is 4 but gave 3 items"):
        list(DistributedSamplerWrapper(Liar(), 2, 0))


@pytest.mark.proves("13.11")
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_whole_batches_are_dealt_to_ranks(ranks) -> None:
    batches = [[0, 1], [2], [3, 4, 5], [6], [7, 8]]
    exact = [list(DistributedBatchSampler(batches, ranks, rank, pad=False)) for rank in range(ranks)]
    padded = [list(DistributedBatchSampler(batches, ranks, rank, pad=True)) for rank in range(ranks)]
    assert sorted(batch for part in exact for batch in part) == sorted(batches)
    assert len({len(part) for part in padded}) == 1
    assert all(batch in batches for part in padded for batch in part)
    assert [len(DistributedBatchSampler(batches, ranks, rank, pad=False)) for rank in range(ranks)] == [
        len(part) for part in exact
    ]


def test_random_batches_are_dealt_in_agreement_and_anew_each_epoch() -> None:
    def parts(epoch: int) -> list[list[int]]:
        found = []
        for rank in range(3):
            torch.manual_seed(rank)
            sampler = DistributedBatchSampler(BatchSampler(RandomSampler(range(30)), 4, False), 3, rank, pad=False)
            sampler.set_epoch(epoch)
            found += list(sampler)
        return found

    assert sorted(index for batch in parts(0) for index in batch) == list(range(30))
    assert parts(0) != parts(1)
    assert parts(1) == parts(1)


def test_the_index_tracker_knows_each_batch_of_the_current_iteration() -> None:
    tracker = IndexBatchSamplerWrapper(BatchSampler(SequentialSampler(range(5)), 2, False))
    assert list(tracker) == tracker.seen_batch_indices == [[0, 1], [2, 3], [4]]
    iterator = iter(tracker)
    next(iterator)
    assert tracker.seen_batch_indices == [[0, 1]]
    assert (len(tracker), tracker.batch_size, tracker.drop_last) == (3, 2, False)
    assert isinstance(tracker.sampler, SequentialSampler)
    with pytest.raises(AttributeError):
        _ = tracker.nonsense
