from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from fulmen_data import CombinedLoader, has_len

# Python 3.12 warns whenever a process with threads forks, as every DataLoader with workers does.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.proves("13.10")
def test_min_size_stops_with_the_shortest_and_keeps_the_collections_shape() -> None:
    combined = CombinedLoader({"a": range(3), "b": [range(10, 15), range(20, 24)]}, "min_size")
    assert list(combined) == [
        ({"a": 0, "b": [10, 20]}, 0, 0),
        ({"a": 1, "b": [11, 21]}, 1, 0),
        ({"a": 2, "b": [12, 22]}, 2, 0),
    ]
    assert len(combined) == 3


@pytest.mark.proves("13.10")
def test_max_size_cycle_begins_short_loaders_again() -> None:
    combined = CombinedLoader([range(2), range(10, 15)], "max_size_cycle")
    assert [batch for batch, *_ in combined] == [[0, 10], [1, 11], [0, 12], [1, 13], [0, 14]]
    assert len(combined) == 5


@pytest.mark.proves("13.10")
def test_max_size_pads_with_none() -> None:
    combined = CombinedLoader((range(2), range(10, 13)), "max_size")
    assert list(combined) == [((0, 10), 0, 0), ((1, 11), 1, 0), ((None, 12), 2, 0)]
    assert len(combined) == 3


@pytest.mark.proves("13.10")
def test_sequential_reads_one_after_the_other_and_counts_each_from_zero() -> None:
    combined = CombinedLoader([range(2), [], range(10, 12)], "sequential")
    assert list(combined) == [(0, 0, 0), (1, 1, 0), (10, 0, 2), (11, 1, 2)]
    assert len(combined) == 4


def test_sequential_does_not_begin_a_loader_before_its_turn() -> None:
    begun = []

    class Loader:
        def __init__(self, name: str) -> None:
            self.name = name

        def __iter__(self):
            begun.append(self.name)
            return iter([1, 2])

    iterator = iter(CombinedLoader([Loader("a"), Loader("b")], "sequential"))
    assert begun == []
    next(iterator)
    next(iterator)
    assert begun == ["a"]
    next(iterator)
    assert begun == ["a", "b"]


MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    mode=st.sampled_from(MODES),
    limit=st.one_of(st.none(), st.integers(0, 7)),
)
def test_the_length_is_the_number_of_items_in_every_mode_and_a_limit_makes_loaders_shorter(sizes, mode, limit) -> None:
    if mode == "max_size_cycle" and 0 in (min(sizes), limit):
        return  # a loader with nothing cannot cycle; see below
    combined = CombinedLoader([range(size) for size in sizes], mode)
    combined.limits = limit
    items = list(combined)
    assert len(items) == len(combined)

    shortened = CombinedLoader([range(min(size, 99 if limit is None else limit)) for size in sizes], mode)
    assert items == list(shortened)
    assert list(combined) == items, "each pass is the same"


def test_limits_may_differ_by_loader() -> None:
    combined = CombinedLoader([range(5), range(10, 15)], "sequential")
    combined.limits = [1, float("inf")]
    assert [batch for batch, *_ in combined] == [0, 10, 11, 12, 13, 14]
    assert combined.limits == [1, float("inf")]
    with pytest.raises(ValueError, match="has 3 entries; this CombinedLoader holds 2"):
        combined.limits = [1, 2, 3]


def test_an_empty_loader_in_a_cycle_ends_the_pass() -> None:
    assert list(CombinedLoader([range(2), []], "max_size_cycle")) == []


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


def test_a_loader_without_length_takes_part_and_only_the_length_is_missing() -> None:
    stream = DataLoader(Stream(), batch_size=None)
    longest = CombinedLoader([stream, range(2)], "max_size")
    assert len([item for item in longest]) == 4  # noqa: C416
    assert not has_len(longest)
    with pytest.raises(TypeError, match="has no length: one of its loaders has none"):
        len(longest)
    longest.limits = 3
    assert len(longest) == 3
    assert len(CombinedLoader([stream, range(2)], "min_size")) == 2


@pytest.mark.proves("13.10")
def test_collections_of_every_kind_keep_their_kind() -> None:
    tree = OrderedDict(p=Pair(range(2), {"z": range(2)}), q=(range(2), [range(2)]))
    batch, _, _ = next(iter(CombinedLoader(tree, "min_size")))
    assert batch == OrderedDict(p=Pair(0, {"z": 0}), q=(0, [0]))
    assert type(batch) is OrderedDict
    assert type(batch["p"]) is Pair


def test_a_list_of_plain_values_is_a_loader_and_so_is_a_lone_one() -> None:
    assert [batch for batch, *_ in CombinedLoader([[1, 2], ["x", "y"]], "min_size")] == [[1, "x"], [2, "y"]]
    assert [batch for batch, *_ in CombinedLoader(range(2), "max_size")] == [0, 1]
    tensors = [torch.zeros(1), torch.ones(1)]
    assert CombinedLoader({"a": tensors}).flattened == [tensors]


def test_no_loaders_at_all_is_an_empty_loader() -> None:
    for mode in MODES:
        combined = CombinedLoader([], mode)
        assert list(combined) == []
        assert len(combined) == 0


def test_loaders_can_be_listed_and_replaced() -> None:
    first, second = DataLoader([1, 2]), DataLoader([3, 4])
    combined = CombinedLoader({"a": first, "b": [second]})
    assert combined.flattened == [first, second]
    assert isinstance(combined.sampler["a"], SequentialSampler)
    assert combined.batch_sampler["b"][0] is second.batch_sampler
    new = DataLoader([5])
    combined.flattened = [new, second]
    assert combined.iterables == {"a": new, "b": [second]}
    assert len(combined) == 1
    with pytest.raises(ValueError, match="given 1 loaders; this CombinedLoader holds 2"):
        combined.flattened = [new]
    assert CombinedLoader([[1, 2]]).sampler == [None]


def test_asking_for_a_batch_before_iter_is_an_error_and_reset_makes_it_so_again() -> None:
    combined = CombinedLoader([range(3)])
    with pytest.raises(RuntimeError, match="before iter"):
        next(combined)
    next(iter(combined))
    combined.reset()
    with pytest.raises(RuntimeError, match="before iter"):
        next(combined)
    assert len(list(combined)) == 3


def test_an_unknown_mode_names_the_closest_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'max_size_cycle'"):
        CombinedLoader([], "max_size_cicle")


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_loaders_with_workers_are_read_side_by_side(mode) -> None:
    loaders = [DataLoader(list(range(6)), 2, num_workers=1), DataLoader(list(range(10, 14)), 2, num_workers=1)]
    batches = [[part.tolist() for part in batch] for batch, *_ in CombinedLoader(loaders, mode)]
    assert batches[:2] == [[[0, 1], [10, 11]], [[2, 3], [12, 13]]]
    assert len(batches) == (2 if mode == "min_size" else 3)
