"""The tensors of nested collections, and bringing them from XLA devices to the host, all in one transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

from fulmen_protocols.nested import map_instances
from fulmen_xla._library import library

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["tensors_of", "to_host"]


def to_host(tree: Mapping[str, object]) -> dict[str, object]:
    """A copy of ``tree`` with every XLA tensor on the CPU; other leaves are taken as they are.

    What is recorded is run first, once, instead of once for each tensor that is read.
    """
    found = [tensor.detach() for tensor in tensors_of(tree) if tensor.device.type == "xla"]
    if not found:
        return dict(tree)
    library().sync()
    answers = iter(cast("list[Tensor]", library()._XLAC._xla_get_cpu_tensors(found)))
    moved = map_instances(Tensor, lambda one: next(answers) if one.device.type == "xla" else one, tree)
    return dict(cast("Mapping[str, object]", moved))


def tensors_of(tree: object) -> list[Tensor]:
    """Every tensor in ``tree``, in the order of ``map_instances``."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_instances(Tensor, note, tree)
    return found
