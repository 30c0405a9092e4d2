"""Joining rows of metrics."""

from __future__ import annotations

import pytest

from fulmen_loggers import merge_dicts


@pytest.mark.proves("6.6")
def test_values_under_one_key_are_aggregated_and_nested_ones_by_the_nested_keys() -> None:
    first = {"a": 1.0, "b": 2.0, "c": 1.0, "d": {"v": 1.0, "w": 4.0}}
    second = {"a": 3.0, "b": 4.0, "e": 5.0, "d": {"v": 3.0}}

    merged = merge_dicts([first, second], agg_key_funcs={"b": max, "d": {"v": sum}})

    assert merged == {"a": 2.0, "b": 4.0, "c": 1.0, "d": {"v": 4.0, "w": 4.0}, "e": 5.0}
