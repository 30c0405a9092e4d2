"""Weights of a module that the engine has spread over ranks or keeps in another dtype: taken whole, and given back.

Names are those of the user's module. Every function but ``is_partitioned`` is called by every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fulmen_deepspeed._library import submodule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fulmen_deepspeed._entry import EngineEntry
    from fulmen_deepspeed.collectives import EngineCollectives

__all__ = [
    "Outcome",
    "each_from_first",
    "forget_gradients",
    "is_partitioned",
    "load_module_state",
    "local_part",
    "module_state",
]


class Outcome(NamedTuple):
    """Which names did not meet, as ``nn.Module.load_state_dict`` tells it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


# Any: what ZeRO puts on parameters (ds_id, ds_shape, ...) is in no annotation.
def _is_spread(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter) and hasattr(tensor, "ds_id")


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO's third stage has the parameters of ``module``."""
    return any(_is_spread(parameter) for parameter in module.parameters())


def _zero_steps(entry: EngineEntry) -> bool:
    """Whether the engine steps float32 weights beside the module's own."""
    return entry.trains and bool(entry.engine.zero_optimization())


def module_state(entry: EngineEntry, *, full: bool, rank: int) -> dict[str, Any]:
    """The module's state; ``full``: whole CPU tensors on rank 0, nothing elsewhere; otherwise what this rank holds."""
    dtype = entry.casting.plan["parameter"]
    state: dict[str, Any] = {}
    seen: dict[int, Tensor] = {}  # a parameter with several names is gathered once
    for name, value in entry.module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            state[name] = value
            continue
        if not full and _is_spread(value):
            state[name] = _part_of(value, entry).detach().clone()
            continue
        found = seen.get(id(value))
        if found is None:
            whole = _whole(value, entry)
            if isinstance(value, nn.Parameter) and whole.is_floating_point():
                whole = whole.to(dtype)
            # Weights of a run are views of the engine's buffers, which go on changing.
            found = whole.to("cpu", copy=True) if not full or rank == 0 else whole
            seen[id(value)] = found if not full or rank == 0 else value
        if not full or rank == 0:
            state[name] = found
    return state if not full or rank == 0 else {}


def _whole(value: Any, entry: EngineEntry) -> Tensor:
    if _zero_steps(entry) and isinstance(value, nn.Parameter) and value.requires_grad:
        master = submodule("deepspeed.utils").safe_get_full_fp32_param(value)
        if master is not None:
            return cast("Tensor", master).detach()
    if _is_spread(value):
        with submodule("deepspeed").zero.GatheredParameters([value]):
            return cast("Tensor", value.detach().clone())
    return cast("Tensor", value.detach())


def _part_of(value: Any, entry: EngineEntry) -> Tensor:
    if _zero_steps(entry) and value.requires_grad:
        return cast("Tensor", submodule("deepspeed.utils").safe_get_local_fp32_param(value))
    return cast("Tensor", value.ds_tensor)


def load_module_state(
    entry: EngineEntry, state: Mapping[str, Any], collectives: EngineCollectives, *, strict: bool
) -> Outcome:
    """Load what ``module_state`` gave, of either kind; a full one counts on rank 0.

    Raises:
        RuntimeError: names or shapes do not fit; with ``strict`` also where a name is missing or unknown.
    """
    targets: dict[str, Any] = entry.module.state_dict(keep_vars=True)
    are_parts = collectives.broadcast_object(
        any(_is_spread(targets.get(name)) and value.shape != targets[name].ds_shape for name, value in state.items())
    )
    names = list(state) if are_parts else collectives.broadcast_object(list(state))
    outcome = Outcome([n for n in targets if n not in names], [n for n in names if n not in targets])
    _refuse(entry.module, outcome, strict)
    for name, value in state.items() if are_parts else each_from_first(state, collectives):
        if name in targets:
            _set(name, targets[name], value, entry, collectives)
    engine = entry.engine
    if entry.trains and not _zero_steps(entry) and hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()
    return outcome


def _refuse(module: nn.Module, outcome: Outcome, strict: bool) -> None:
    if strict and (outcome.missing_keys or outcome.unexpected_keys):
        raise RuntimeError(
            f"the state does not fit {type(module).__name__}: missing {outcome.missing_keys!r}, unexpected "
            f"{outcome.unexpected_keys!r}. Give a state of this module, or load with strict=False."
        )


def _set(name: str, target: Any, value: Any, entry: EngineEntry, collectives: EngineCollectives) -> None:
    if not isinstance(target, Tensor):
        entry.module.load_state_dict({name: value}, strict=False)  # what set_extra_state takes
        return
    if not _is_spread(target):
        if target.shape != value.shape:
            raise _misfit(name, value.shape, target.shape)
        with torch.no_grad():
            target.copy_(value)
        if _zero_steps(entry) and target.requires_grad:
            on_device = value.to(target.device, torch.float32)
            submodule("deepspeed.utils").safe_set_full_fp32_param(target, on_device)
        return
    spread: Any = target
    if value.shape == spread.ds_shape:
        value = local_part(value, spread, collectives)
    elif value.numel() != spread.ds_tensor.numel():
        raise _misfit(name, value.shape, spread.ds_shape)
    flat = value.reshape(-1)
    spread.ds_tensor.data.copy_(flat[: spread.ds_tensor.numel()])
    if _zero_steps(entry) and spread.requires_grad:
        submodule("deepspeed.utils").safe_set_local_fp32_param(spread, flat.to(torch.float32))


def _misfit(name: str, given: object, own: object) -> RuntimeError:
    return RuntimeError(
        f"{name} has shape {tuple(cast('Any', given))} in the state and {tuple(cast('Any', own))} here."
    )


def local_part(value: Tensor, parameter: Any, collectives: EngineCollectives) -> Tensor:
    """What stage 3 keeps of ``value`` on this rank: an equal share of its elements in order, padded at the end."""
    share = int(parameter.ds_tensor.numel())
    flat = value.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(share * collectives.world_size - flat.numel())])
    return padded.narrow(0, share * collectives.rank, share)


def each_from_first(state: Mapping[Any, Any], collectives: EngineCollectives) -> Iterator[tuple[Any, Any]]:
    """Every entry of rank 0's ``state`` on every rank, one after the other, so that none need hold them all."""
    described = [
        (
            name,
            (value.shape, value.dtype) if isinstance(value, Tensor) else None,
            None if isinstance(value, Tensor) else value,
        )
        for name, value in state.items()
    ]
    for name, tensor, plain in collectives.broadcast_object(described):
        if tensor is None:
            yield name, plain
        else:
            shape, dtype = tensor
            mine = state[name].detach().cpu() if collectives.rank == 0 else torch.empty(shape, dtype=dtype)
            yield name, collectives.broadcast(mine)


def forget_gradients(module: nn.Module) -> None:
    """Drop what an engine that was taken apart may have left in ``.grad``."""
    for parameter in module.parameters():
        parameter.grad = None
