"""The batch of a plan: written out as dtypes and shapes, or a real one without its values."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fulmen_protocols import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen.memory_plan._fake_world import FakeTensors

__all__ = ["described", "fake_batch", "parse_batch", "resized"]

_PIECE = re.compile(r"\s*(?:(?P<name>\w+)\s*=\s*)?(?P<dtype>\w+)\s*\[(?P<shape>[\d\s,]*)\]\s*")
_SHORT = {"f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16", "i32": "int32", "i64": "int64"}
_EXAMPLES = "int64[16,1024] | float32[32,3,224,224],int64[32] | x=float32[8,16],y=int64[8]"


def parse_batch(text: str) -> Any:
    """Empty tensors of a text like ``"float32[32,3,224,224],int64[32]"``.

    Returns:
        A tensor; a tuple where there are several; a dict where they have names.

    Raises:
        MisconfigurationException: it cannot be read, or a dtype does not exist.
    """
    pieces: list[tuple[str | None, Tensor]] = []
    place = 0
    while True:
        match = _PIECE.match(text, place)
        if match is None:
            raise _unreadable(text, f"{text[place:]!r} is no dtype with a shape")
        pieces.append((match["name"], _empty(text, match["dtype"], match["shape"])))
        place = match.end()
        if place == len(text):
            break
        if text[place] != ",":
            raise _unreadable(text, f"a comma belongs before {text[place:]!r}")
        place += 1
    names = [name for name, _ in pieces if name is not None]
    if names and (len(names) != len(pieces) or len(set(names)) != len(names)):
        raise _unreadable(text, "either every tensor has a name of its own or none has")
    if names:
        return dict(cast("list[tuple[str, Tensor]]", pieces))
    tensors = [tensor for _, tensor in pieces]
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


def _empty(text: str, dtype: str, shape: str) -> Tensor:
    found = getattr(torch, _SHORT.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype):
        known = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
        raise _unreadable(text, f"torch has no dtype {dtype!r}.{did_you_mean(dtype, known)}")
    sizes = [int(size) for size in shape.split(",") if size.strip()]
    return torch.empty(sizes, dtype=found, device="meta")


def _unreadable(text: str, why: str) -> MisconfigurationException:
    return MisconfigurationException(f"batch={text!r} cannot be read: {why}. Write it like one of {_EXAMPLES}")


def resized(batch: Any, size: int) -> Any:
    """``batch`` with ``size`` samples: first dimensions that are as long as the first tensor's become ``size``.

    Raises:
        MisconfigurationException: it has no dimension to change, or ``size`` is not positive.
    """
    if size < 1:
        raise MisconfigurationException(f"batch_size={size!r}: give at least 1.")
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None:
        raise MisconfigurationException(
            f"batch_size={size!r} was given, but the batch ({described(batch)}) has no tensor with a first dimension. "
            "Write the batch out: batch='int64[8,1024]'."
        )
    before = first.shape[0]

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != before:
            return leaf
        return torch.empty((size, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")

    return tree_map(resize, batch)


def fake_batch(fakes: FakeTensors, batch: Any) -> Any:
    """``batch`` on the CPU with fake tensors in place of its own; objects with attributes, too."""

    def fake(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            with fakes:
                return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")
        if is_dataclass(leaf) and not isinstance(leaf, type):
            changed = {each.name: tree_map(fake, getattr(leaf, each.name)) for each in fields(leaf) if each.init}
            return type(leaf)(**changed)
        return leaf

    return tree_map(fake, batch)


def described(batch: object) -> str:
    """``batch`` for people: ``int64[16, 1024]``, by name where tensors have one."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, dict):
        return ", ".join(f"{key}={described(value)}" for key, value in cast("Mapping[Any, Any]", batch).items())
    if isinstance(batch, (list, tuple)):
        return ", ".join(described(each) for each in cast("list[Any]", batch))
    return type(batch).__name__
