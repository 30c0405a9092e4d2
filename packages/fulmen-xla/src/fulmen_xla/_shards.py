"""The shards into which torch-xla's FSDP cuts parameters: their names, and whole tensors from them and into them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from fulmen_protocols.nested import map_instances
from fulmen_xla._host import to_host
from fulmen_xla._library import library
from fulmen_xla._placing import sync

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn
    from torch.optim import Optimizer

    from fulmen_xla.collectives import XLACollectives

__all__ = ["Layout", "Outcome"]

_MARKS = ("_fsdp_wrapped_module", "_fpw_module", "_orig_mod")


class Outcome(NamedTuple):
    """Which names did not meet, as ``nn.Module.load_state_dict`` tells it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Shard(NamedTuple):
    parameter: nn.Parameter
    """This rank's part, flat and padded."""
    size: torch.Size
    """Of the whole parameter."""
    wrapper: Any
    """The FSDP module that has it."""


class Layout:
    """Made from the user's module before it is wrapped: afterwards its own ``state_dict`` has no parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._names = list(module.state_dict())
        self._module = module
        first: dict[int, str] = {}
        self._same_as: dict[str, str] = {}
        """A shared parameter's other names, and the one under which it is sharded."""
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._same_as[name] = first.setdefault(id(parameter), name)
        self._shards: dict[str, _Shard] = {}

    def find_shards(self, placed: nn.Module) -> None:
        """Learn which shard came of which parameter."""
        for prefix, wrapper in cast("Iterable[tuple[str, Any]]", placed.named_modules()):
            for parameter in cast("list[Any]", getattr(wrapper, "sharded_params", None) or []):
                name = _canonical(f"{prefix}.{parameter._orig_name}")
                self._shards[name] = _Shard(parameter, torch.Size(parameter._orig_size), wrapper)

    def module_state(self, collectives: XLACollectives, *, full: bool) -> dict[str, object]:
        """By canonical name, in the order that the module had."""
        sync()
        buffers = self._buffers()
        state: dict[str, object] = {}
        for name in self._names:
            shard = self._shard_of(name)
            if shard is not None:
                value = shard.parameter.detach()
                state[name] = _whole(value, shard.size, collectives) if full else value
            elif name in buffers:
                state[name] = buffers[name].detach()
            else:
                raise RuntimeError(f"{name} is neither a parameter nor a buffer of the module that was placed.")
        if not full:
            return state
        return to_host(state) if collectives.rank == 0 else {}

    def load_module_state(self, state: Mapping[str, object], collectives: XLACollectives, *, strict: bool) -> Outcome:
        """Load whole tensors or shards; a whole state counts on rank 0 where the others have none."""
        state = _everywhere(state, collectives)
        missing = [name for name in self._names if name not in state]
        unexpected = [name for name in state if name not in self._names]
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing from the state: {missing}; not in the module: {unexpected}.")
        buffers = self._buffers()
        with torch.no_grad():
            for name in self._names:
                if name not in state:
                    continue
                value = cast("Tensor", state[name])
                shard = self._shard_of(name)
                target = buffers[name] if shard is None else shard.parameter
                target.copy_(value if shard is None else _part(value, shard, name))
        sync()
        return Outcome(missing, unexpected)

    def optimizer_state(self, optimizer: Optimizer, collectives: XLACollectives, *, full: bool) -> dict[str, object]:
        """In torch's layout: whole CPU tensors on rank 0, or this rank's shards."""
        sync()
        state: dict[str, Any] = optimizer.state_dict()
        if not full:
            return state
        shards = self._by_number(optimizer)
        whole = {
            number: {
                key: _whole(value, shards[number].size, collectives) if _is_like(value, shards.get(number)) else value
                for key, value in kept.items()
            }
            for number, kept in state["state"].items()
        }
        return to_host({**state, "state": whole}) if collectives.rank == 0 else {}

    def load_optimizer_state(
        self, optimizer: Optimizer, state: Mapping[str, object], collectives: XLACollectives
    ) -> None:
        """Load whole tensors or shards into an optimizer of the placed module."""
        known = cast("dict[str, Any]", _everywhere(state, collectives))
        shards = self._by_number(optimizer)

        def fitted(number: int, value: object) -> object:
            shard = shards.get(number)
            if not isinstance(value, Tensor):
                return value
            if shard is not None and value.shape == shard.size and value.dim() > 0:
                return _part(value, shard, str(number))
            return value.detach().clone()  # optimizers take tensors as they are

        mine = {n: {key: fitted(n, value) for key, value in kept.items()} for n, kept in known["state"].items()}
        optimizer.load_state_dict({**known, "state": mine})
        sync()

    def _shard_of(self, name: str) -> _Shard | None:
        return self._shards.get(self._same_as.get(name, name))

    def _buffers(self) -> dict[str, Tensor]:
        return {_canonical(name): value for name, value in self._module.named_buffers()}

    def _by_number(self, optimizer: Optimizer) -> dict[int, _Shard]:
        """Each shard by the number that the optimizer's state has for it."""
        by_id = {id(shard.parameter): shard for shard in self._shards.values()}
        held = [one for group in optimizer.param_groups for one in cast("list[Tensor]", group["params"])]
        return {number: by_id[id(one)] for number, one in enumerate(held) if id(one) in by_id}


def _canonical(name: str) -> str:
    parts = [part for part in name.split(".") if part and part not in _MARKS]
    # The first "module" is the entry, which stands between the wrapper and the user's module.
    return ".".join(parts[1:] if parts and parts[0] == "module" else parts)


def _is_like(value: object, shard: _Shard | None) -> bool:
    return isinstance(value, Tensor) and shard is not None and value.shape == shard.parameter.shape and value.dim() > 0


def _whole(shard: Tensor, size: torch.Size, collectives: XLACollectives) -> Tensor:
    """All ranks' parts put together, without the padding, in the parameter's own shape."""
    flat = shard if collectives.world_size == 1 else library("core.xla_model").all_gather(shard.contiguous(), dim=0)
    if flat.dim() > 1:  # shard_param_on_dim_0
        return cast("Tensor", flat[: size[0]])
    return cast("Tensor", flat[: math.prod(size)].view(size))


def _part(value: Tensor, shard: _Shard, name: str) -> Tensor:
    """This rank's part of a whole tensor, or a part as it is."""
    if value.shape == shard.parameter.shape and value.shape != shard.size:
        return value.detach().to(shard.parameter.device).clone()
    if value.shape != shard.size:
        raise RuntimeError(f"{name} has the shape {list(value.shape)}, and the module's has {list(shard.size)}.")
    return cast("Tensor", shard.wrapper._get_shard(value.detach().to(shard.parameter.device)))


def _everywhere(state: Mapping[str, object], collectives: XLACollectives) -> Mapping[str, object]:
    """Rank 0's state for ranks without one; as it is where every rank has its own."""
    if collectives.world_size == 1 or all(collectives.all_gather_object(bool(state))):
        return state
    on_host = map_instances(Tensor, lambda one: one.cpu(), state)
    return cast("Mapping[str, object]", collectives.broadcast_object(on_host))
