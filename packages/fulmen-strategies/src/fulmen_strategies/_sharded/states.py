"""State of modules and optimizers whose parameters are DTensors: whole on rank 0, or each rank's shards; and back.

Names and numbers are those of the unsharded module and optimizer, so that a state moves between strategies and numbers
of ranks. Every function is called by every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fulmen_strategies._sharded.layout import each_from_first, laid_out_like, map_tensors, to_host

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from fulmen_strategies.collectives import TorchCollectives

__all__ = [
    "Outcome",
    "canonical",
    "load_module_state",
    "load_optimizer_state",
    "module_state",
    "optimizer_state",
    "reshard",
]


class Outcome(NamedTuple):
    """Which names did not meet, as ``nn.Module.load_state_dict`` tells it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def canonical(name: str) -> str:
    """``name`` without what ``torch.compile`` puts before the names inside a compiled module."""
    return name.replace("_orig_mod.", "")


def reshard(module: nn.Module) -> None:
    """Register the shards as the parameters of ``module`` again, where an evaluation has left them gathered."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def module_state(module: nn.Module, *, full: bool, rank: int) -> dict[str, Any]:
    """``module.state_dict()``; with ``full`` whole CPU tensors on rank 0 and nothing elsewhere, otherwise DTensors."""
    state: dict[str, Any] = module.state_dict()
    return _whole_on_first(state, rank) if full else state


def optimizer_state(optimizer: Optimizer, *, full: bool, rank: int) -> dict[str, Any]:
    """``optimizer.state_dict()``, with numbered parameters; ``full`` as for ``module_state``."""
    state: dict[str, Any] = optimizer.state_dict()
    return _whole_on_first(state, rank) if full else state


def _whole_on_first(state: dict[str, Any], rank: int) -> dict[str, Any]:
    # One tensor after the other: the others drop each as soon as rank 0 has it.
    mine = map_tensors(lambda tensor: _on_first(tensor, rank), state)
    return cast("dict[str, Any]", mine) if rank == 0 else {}


def _on_first(tensor: Tensor, rank: int) -> Tensor | None:
    if rank == 0:
        return to_host(tensor)
    if isinstance(tensor, DTensor):
        to_host(tensor)
    return None


def load_module_state(
    module: nn.Module, state: Mapping[str, object], collectives: TorchCollectives, *, strict: bool
) -> Outcome:
    """Load what ``module_state`` gave, of either kind and from any number of ranks; a full one counts on rank 0.

    Raises:
        RuntimeError: names or shapes do not fit; with ``strict`` also where a name is missing or unknown.
    """
    targets: dict[str, object] = module.state_dict()
    entries = state.items() if _is_sharded(state) else each_from_first(state, collectives)
    ready = {name: _fitted(value, targets.get(name)) for name, value in entries}
    outcome = cast("Any", module.load_state_dict(ready, strict=strict))
    return Outcome(list(outcome.missing_keys), list(outcome.unexpected_keys))


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any], collectives: TorchCollectives) -> None:
    """Load what ``optimizer_state`` gave, of either kind and from any number of ranks; a full one counts on rank 0.

    Raises:
        ValueError: it belongs to other parameter groups.
    """
    parameters = [cast("Tensor", one) for group in optimizer.param_groups for one in group["params"]]
    if _is_sharded(state):
        groups, entries = state["param_groups"], cast("dict[int, object]", state["state"])
        optimizer.load_state_dict({"state": _fitted_by_parameter(entries, groups, parameters), "param_groups": groups})
        return
    flat = (
        {f"state/{n}/{key}": value for n, each in state["state"].items() for key, value in each.items()}
        if state
        else {}
    )
    mine = cast("list[dict[str, Any]]", state["param_groups"] if state else [])
    groups = collectives.broadcast_object(mine)
    by_number = _numbered(groups, parameters)
    ready: dict[Any, dict[str, object]] = {}
    for name, value in each_from_first(flat, collectives):
        _, number, key = name.split("/", 2)
        ready.setdefault(int(number), {})[key] = _fitted_state(value, by_number.get(int(number)))
    optimizer.load_state_dict({"state": ready, "param_groups": groups})


def _fitted_by_parameter(
    entries: Mapping[int, object], groups: list[dict[str, Any]], parameters: list[Tensor]
) -> dict[int, Any]:
    by_number = _numbered(groups, parameters)
    return {n: map_tensors(lambda t, n=n: _fitted_state(t, by_number.get(n)), each) for n, each in entries.items()}  # type: ignore[misc]


def _numbered(groups: list[dict[str, Any]], parameters: list[Tensor]) -> dict[int, Tensor]:
    """Each parameter by the number that a saved state has for it; torch says where the two do not fit."""
    numbers = [cast("list[int]", group["params"]) for group in groups]
    return dict(zip(itertools.chain(*numbers), parameters, strict=False))


def _fitted_state(value: object, parameter: Tensor | None) -> object:
    """What an optimizer keeps for ``parameter``: a tensor of its shape is laid out as it is, others are kept whole."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor) or parameter is None or value.shape != parameter.shape or value.dim() == 0:
        return value.clone()  # optimizers take tensors as they are; two would go on with the same one
    return laid_out_like(value, parameter).to(value.dtype)


def _fitted(value: object, target: object) -> object:
    if not isinstance(value, Tensor) or not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    # Where the shapes differ, load_state_dict says so.
    return laid_out_like(value, target) if value.shape == target.shape else value


def _is_sharded(tree: object) -> bool:
    """Whether any tensor in ``tree`` is a DTensor."""
    if isinstance(tree, Mapping):
        return any(_is_sharded(value) for value in cast("Mapping[object, object]", tree).values())
    return isinstance(tree, DTensor)
