"""The optimizer that the engine steps: which it takes, and its state in torch's layout."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fulmen_deepspeed import _states
from fulmen_deepspeed._library import submodule
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

    from fulmen_deepspeed._entry import EngineEntry
    from fulmen_deepspeed.collectives import EngineCollectives

__all__ = ["Layout", "adopt", "check", "load_state", "state"]

T = TypeVar("T")

_LAYOUT = "_fulmen_layout"
_PART = "fulmen_part_of_rank"


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of an optimizer by group, as it was before the engine put its own flat ones there."""

    groups: tuple[tuple[nn.Parameter, ...], ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> Layout:
        """That of ``optimizer``; groups without parameters are left out, as the engine does."""
        groups = (tuple(group["params"]) for group in optimizer.param_groups)
        return cls(tuple(group for group in groups if group))


def check(optimizers: Sequence[Optimizer], module: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse what the engine cannot step.

    Raises:
        MisconfigurationException: with the way out.
    """
    if len(optimizers) > 1:
        raise MisconfigurationException(
            f"strategy 'deepspeed' was given {len(optimizers)} optimizers, and its engine steps one. Put all "
            "parameters into one optimizer, with a group for each setting."
        )
    if not optimizers:
        return
    optimizer = optimizers[0]
    name = type(optimizer).__name__
    if "optimizer" in config:
        kind = cast("Mapping[str, Any]", config["optimizer"]).get("type")
        raise MisconfigurationException(
            f"DeepSpeed's configuration defines an optimizer ({kind}), and a {name} was given too. Give one of the two."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise MisconfigurationException(
            f"{name} evaluates its loss several times a step, and DeepSpeed's engine steps after one backward pass. "
            "Use another optimizer, such as AdamW."
        )
    own = {id(parameter) for parameter in module.parameters()}
    if not any(id(one) in own for group in optimizer.param_groups for one in group["params"]):
        raise MisconfigurationException(
            f"{name} holds no parameter of {type(module).__name__}, and DeepSpeed's engine trains with one that does. "
            "Make it from the parameters of this module."
        )
    zero: Any = config.get("zero_optimization")
    offloads = isinstance(zero, Mapping) and bool(cast("Mapping[str, Any]", zero).get("offload_optimizer"))
    if offloads and config.get("zero_force_ds_cpu_optimizer", True) and "deepspeed" not in type(optimizer).__module__:
        raise MisconfigurationException(
            f"offload_optimizer steps in host memory, where DeepSpeed wants an optimizer made for it, and a {name} was "
            "given. Use deepspeed.ops.adam.DeepSpeedCPUAdam, or give a config with zero_force_ds_cpu_optimizer=false "
            f"to step {name} there all the same."
        )


# Any: DeepSpeed has no type information.
def adopt(optimizer: Optimizer, engine: Any, layout: Layout | None) -> None:
    """Prepare the optimizer that the engine has taken over for the run that holds it."""
    optimizer.__dict__[_LAYOUT] = layout
    zero = engine.optimizer
    if zero is optimizer:
        return

    def zero_grad(set_to_none: bool = True) -> None:
        zero.zero_grad()

    # The optimizer's own parameters are now the engine's flat ones, whose gradients are buffers that must stay.
    optimizer.__dict__["zero_grad"] = zero_grad


def _layout(optimizer: Optimizer, entry: EngineEntry) -> Layout:
    known = optimizer.__dict__.get(_LAYOUT)
    if isinstance(known, Layout):
        return known
    return Layout((tuple(one for one in entry.module.parameters() if one.requires_grad),))


def _options(optimizer: Optimizer, layout: Layout) -> list[dict[str, Any]]:
    """The groups as torch's state dicts have them: options, and the numbers of their parameters."""
    groups: list[dict[str, Any]] = []
    first = 0
    for group, parameters in zip(optimizer.param_groups, layout.groups, strict=True):
        kept = {name: value for name, value in group.items() if name != "params"}
        groups.append({**kept, "params": list(range(first, first + len(parameters)))})
        first += len(parameters)
    return groups


def state(entry: EngineEntry, optimizer: Optimizer, *, full: bool, rank: int) -> dict[str, Any]:
    """Optimizer state; ``full``: whole CPU tensors on rank 0 and nothing elsewhere, otherwise the part of this rank."""
    zero = entry.engine.optimizer
    if not full:
        return {_PART: rank, **copy.deepcopy(_with_flat_parameters(zero, optimizer.state_dict))}
    if zero is optimizer:
        whole = copy.deepcopy(optimizer.state_dict())
        return whole if rank == 0 else {}
    layout = _layout(optimizer, entry)
    entries: dict[int, dict[str, Any]] = {}
    get = submodule("deepspeed.utils").safe_get_full_optimizer_state
    number = 0
    for index, group in enumerate(layout.groups):
        shared, keys = _of_group(zero, optimizer, index)
        for parameter in group:
            if parameter.requires_grad and (keys or shared):
                own: dict[str, Any] = dict(copy.deepcopy(shared))
                for key in keys:
                    tensor = cast("Tensor", get(parameter, key))
                    if rank == 0:
                        own[key] = tensor.detach().to("cpu", copy=True)
                entries[number] = own
            number += 1
    return {"state": entries, "param_groups": _options(optimizer, layout)} if rank == 0 else {}


def _with_flat_parameters(zero: Any, do: Callable[[], T]) -> T:
    """``do()`` while the optimizer's groups hold the flat parameters, which stage 3 puts there for a step only."""
    if not hasattr(zero, "_set_fp32_optimizer_param_groups"):
        return do()
    zero._set_fp32_optimizer_param_groups()
    try:
        return do()
    finally:
        zero._clear_fp32_optimizer_param_groups()


def _flat_groups(zero: Any) -> list[list[Tensor]]:
    """The engine's flat float32 parameters, by group of the optimizer."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3: several of them in a group
        groups: dict[int, list[Tensor]] = {}
        for number, part in enumerate(zero.fp32_partitioned_groups_flat):
            groups.setdefault(int(zero.sub_group_to_group_id[number]), []).append(part)
        return [groups[index] for index in sorted(groups)]
    flat = getattr(zero, "single_partition_of_fp32_groups", None)
    if flat is None:
        flat = zero.fp32_groups_flat_partition
    return [[one] for one in flat]


def _of_group(zero: Any, optimizer: Optimizer, index: int) -> tuple[dict[str, Any], list[str]]:
    """What all parameters of a group share (the number of steps), and the names of what each has for itself."""
    flat = _flat_groups(zero)[index][0]
    found: Mapping[str, Any] = optimizer.state.get(flat, {})
    keys = [key for key, value in found.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    return {key: value for key, value in found.items() if key not in keys}, keys


def load_state(
    entry: EngineEntry, optimizer: Optimizer, saved: Mapping[str, Any], collectives: EngineCollectives
) -> None:
    """Load what ``state`` gave, of either kind; a full one counts on rank 0.

    Raises:
        ValueError: it belongs to other parameter groups.
    """
    zero = entry.engine.optimizer
    if _PART in saved:
        plain = {key: value for key, value in saved.items() if key != _PART}
        _with_flat_parameters(zero, lambda: optimizer.load_state_dict(copy.deepcopy(plain)))
        _link(zero, optimizer)
        return
    if zero is optimizer:
        optimizer.load_state_dict(collectives.broadcast_object(dict(saved)))
        return
    layout = _layout(optimizer, entry)
    groups: list[dict[str, Any]] = collectives.broadcast_object(list(saved["param_groups"]) if saved else [])
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group) for group in layout.groups]:
        raise ValueError(
            f"the state has parameter groups of {sizes} parameters, and the optimizer has "
            f"{[len(group) for group in layout.groups]}. Give the state of this optimizer."
        )
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})
    flat_state = {
        (number, key): value for number, each in (saved or {}).get("state", {}).items() for key, value in each.items()
    }
    parameters: list[tuple[int, nn.Parameter]] = [
        (index, one) for index, group in enumerate(layout.groups) for one in group
    ]
    flats = _flat_groups(zero)
    for (number, key), value in _states.each_from_first(flat_state, collectives):
        index, parameter = parameters[int(number)]
        if isinstance(value, Tensor) and key != "step" and value.shape == _shape(parameter):
            for flat, place, part in _places(zero, parameter, value, flats[index], collectives):
                buffer = optimizer.state[flat].setdefault(key, torch.zeros_like(flat))
                buffer.narrow(0, place, part.numel()).copy_(part)
        else:
            for flat in flats[index]:
                optimizer.state[flat][key] = value.clone() if isinstance(value, Tensor) else value
    _link(zero, optimizer)


def _shape(parameter: Any) -> torch.Size:
    return cast("torch.Size", getattr(parameter, "ds_shape", parameter.shape))


def _places(
    zero: Any, parameter: Any, value: Tensor, flats: list[Tensor], collectives: EngineCollectives
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Where a part of ``value`` belongs on this rank: the flat parameter, the first element in it, and the part."""
    if hasattr(parameter, "ds_id"):
        number, start, _ = zero.grad_position[zero.get_param_id(parameter)]
        yield zero.fp32_partitioned_groups_flat[number], int(start), _states.local_part(value, parameter, collectives)
        return
    mapping = parameter._hp_mapping
    if mapping is not None:
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        yield flats[0], int(here.start), value.reshape(-1).narrow(0, there.start, there.numel)


def _link(zero: Any, optimizer: Optimizer) -> None:
    """Let parameters of stages 1 and 2 find their part of the state again."""
    for name in ("bit16_groups", "bf16_groups"):
        groups: list[list[Any]] = list(getattr(zero, name, []))
        for index, group in enumerate(groups):
            flat = _flat_groups(zero)[index][0]
            for parameter in group:
                if getattr(parameter, "_hp_mapping", None) is not None:
                    parameter._hp_mapping.set_optim_state_fragment(flat, optimizer.state[flat])
