"""Nested collections: what is entered, what keeps its type, and what is returned as it was."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from fulmen_protocols import map_instances


class Pair(NamedTuple):
    x: object
    y: object


class Row(list[object]):
    pass


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: object
    seen: object = dataclasses.field(init=False, default=1.0)
    later: object = dataclasses.field(init=False)


@dataclasses.dataclass
class Measure(float):
    """A float, and a dataclass that holds one."""

    inner: float = 1.0


def doubled(data: object) -> Any:
    return map_instances(float, lambda value: value * 2, data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (1.5, 3.0),
        ([1.5, 1, "1.5"], [3.0, 1, "1.5"]),
        ((1.5, [2.5, (3.5,)]), (3.0, [5.0, (7.0,)])),
        (Pair(1.5, {"a": 2.5}), Pair(3.0, {"a": 5.0})),
        (Row([1.5]), Row([3.0])),
        (OrderedDict(b=1.5, a=1), OrderedDict(b=3.0, a=1)),
        (UserDict({"a": 1.5}), UserDict({"a": 3.0})),
        (MappingProxyType({"a": 1.5, "b": 2}), {"a": 3.0, "b": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_instances_are_replaced_at_any_depth_and_collections_keep_their_type(data: object, expected: object) -> None:
    got = doubled(data)

    assert got == expected
    assert type(got) is type(expected)


def test_a_default_dict_keeps_its_factory() -> None:
    got = doubled(defaultdict(list, a=1.5))

    assert got["a"] == 3.0
    assert got["nothing yet"] == []


def test_dataclass_instances_are_copied_frozen_ones_too_and_may_lack_a_value() -> None:
    given = Frozen([1.5])

    got = doubled(given)

    assert (got.value, got.seen) == ([3.0], 2.0)
    assert (given.value, given.seen) == ([1.5], 1.0)
    assert not hasattr(got, "later")


@pytest.mark.parametrize("data", [[1, "a"], (1, {"b": [None]}), Pair(1, 2), Frozen(1), {"a": object()}, Frozen, None])
def test_what_holds_no_instance_comes_back_as_the_same_object(data: object) -> None:
    assert map_instances(bytes, bytes.upper, data) is data


def test_a_collection_in_which_nothing_changes_comes_back_beside_one_in_which_something_does() -> None:
    kept, changed = [1, 2], [1.5]
    data = {"kept": kept, "changed": changed}

    got = doubled(data)

    assert got["kept"] is kept
    assert (got["changed"], data["changed"]) == ([3.0], [1.5])


def test_instances_are_visited_in_the_order_in_which_they_stand() -> None:
    seen: list[float] = []

    map_instances(float, seen.append, {"b": [1.0, (2.0,)], "a": Pair(3.0, Frozen(4.0))})

    assert seen == [1.0, 2.0, 3.0, 4.0, 1.0]


def test_an_instance_that_is_a_collection_itself_is_not_entered() -> None:
    assert map_instances(dict, len, [{"a": {"b": 1}}]) == [1]
    assert map_instances(float, lambda value: type(value), Measure(2.0)) is Measure
