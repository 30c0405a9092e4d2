"""Dtypes around a forward pass: of what goes in, of what is made inside, of what comes out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType

    from fulmen_protocols.precision import PrecisionPlan

__all__ = ["SINGLE", "Casting", "DefaultDtype", "cast_floating"]

SINGLE: PrecisionPlan = {
    "parameter": torch.float32,
    "compute": torch.float32,
    "reduction": torch.float32,
    "output": torch.float32,
    "scaler": "none",
}
"""Full precision."""


def cast_floating(data: object, dtype: torch.dtype) -> object:
    """``data`` with every real floating tensor in ``dtype``, in collections of any depth; nothing is changed in place.

    Lists, tuples, named tuples, mappings and dataclass instances are entered. What holds no tensor to cast is returned
    as the same object.
    """
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, (list, tuple)):
        given = cast("list[object] | tuple[object, ...]", data)
        items = [cast_floating(item, dtype) for item in given]
        if all(new is old for new, old in zip(items, given, strict=True)):
            return given
        kind = cast("type[object]", type(given))
        if kind is list:
            return items
        return kind(*items) if hasattr(given, "_fields") else kind(items)  # type: ignore[call-arg]  # as tuples take it
    if isinstance(data, Mapping):
        mapping = cast("Mapping[object, object]", data)
        casts = {key: cast_floating(value, dtype) for key, value in mapping.items()}
        changed = {key: value for key, value in casts.items() if value is not mapping[key]}
        if not changed:
            return mapping
        if isinstance(mapping, MutableMapping):  # a copy keeps the attributes and the order of a subclass
            result = copy.copy(mapping)
            result.update(changed)
            return result
        return casts
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _cast_dataclass(data, dtype)
    return data


def _cast_dataclass(data: object, dtype: torch.dtype) -> object:
    values = {field.name: getattr(data, field.name, None) for field in dataclasses.fields(data)}  # type: ignore[arg-type]
    casts = {name: cast_floating(value, dtype) for name, value in values.items()}
    changed = {name: value for name, value in casts.items() if value is not values[name]}
    if not changed:
        return data
    result = copy.copy(data)  # dataclasses.replace cannot set fields with init=False
    for name, value in changed.items():
        object.__setattr__(result, name, value)  # frozen ones too
    return result


class DefaultDtype:
    """Within the block ``torch.get_default_dtype()`` is ``dtype``; afterwards what it was at entry."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._before: list[torch.dtype] = []  # a stack: it may be entered within itself

    def __enter__(self) -> None:
        self._before.append(torch.get_default_dtype())
        torch.set_default_dtype(self._dtype)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_default_dtype(self._before.pop())


class Casting:
    """What a plan means for calls of a module.

    Under the engine weights have the dtype of computation, so floating inputs get it too; losses are computed in it as
    well. Without an engine, in evaluation, a mixed plan is autocast over weights that stay as they are.
    """

    def __init__(self, plan: PrecisionPlan) -> None:
        self.plan = plan
        self.is_single = plan["compute"] == torch.float32

    def inputs(self, values: object) -> object:
        """Arguments of a call, floating tensors in the dtype of computation."""
        return values if self.is_single else cast_floating(values, self.plan["compute"])

    def output(self, value: object) -> object:
        """What a plain forward hands back, floating tensors in the plan's output dtype."""
        return value if self.is_single else cast_floating(value, self.plan["output"])

    def evaluation(self, device_type: str) -> AbstractContextManager[object]:
        """Surrounds a call without an engine."""
        plan = self.plan
        if plan["parameter"] != plan["compute"]:
            return torch.autocast(device_type, dtype=plan["compute"])
        return nullcontext() if self.is_single else DefaultDtype(plan["compute"])
