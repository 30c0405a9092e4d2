"""Joining the metrics of several sources into one row."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    _Joins = Callable[[Sequence[float]], float]

__all__ = ["merge_dicts"]


def merge_dicts(
    dicts: Sequence[Mapping[str, object]],
    agg_key_funcs: Mapping[str, object] | None = None,
    default_func: _Joins = statistics.mean,
) -> dict[str, object]:
    """One dict of all: values under the same key are aggregated, nested dicts by the nested keys.

    Args:
        dicts: what is joined.
        agg_key_funcs: how, for keys that ``default_func`` is wrong for: a function of the values, and for a nested dict
            a mapping of its own.
        default_func: how for all others; by default their mean.
    """
    functions = agg_key_funcs or {}
    merged: dict[str, object] = {}
    for key in {key: None for one in dicts for key in one}:
        values = [one[key] for one in dicts if key in one]
        function = functions.get(key)
        if isinstance(values[0], dict):
            nested = cast("Mapping[str, object] | None", function)
            merged[key] = merge_dicts(cast("list[Mapping[str, object]]", values), nested, default_func)
        else:
            join = cast("_Joins | None", function) or default_func
            merged[key] = join(cast("list[float]", values))
    return merged
