"""From policies to modules: which are sharded, gathered and freed as one, and which are recomputed in backward."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Policy", "check_policy", "chosen", "mark_as_unit", "marked_units", "recompute", "without_shared"]

Policy = AbstractSet[type[nn.Module]] | Callable[..., Any] | CustomPolicy
"""Classes of modules, or a function: of a module alone, or as the policies of ``torch.distributed.fsdp.wrap``."""

_UNIT = "_fulmen_is_unit"
_RECOMPUTED = "_fulmen_is_recomputed"


def check_policy(name: str, policy: object) -> None:
    """Refuse what is no policy.

    Raises:
        MisconfigurationTypeError: ``policy`` is neither a set of module classes nor callable.
    """
    if policy is None or isinstance(policy, CustomPolicy):
        return
    if isinstance(policy, AbstractSet):
        wrong = [one for one in cast("AbstractSet[object]", policy) if not _is_module_class(one)]
        if wrong:
            raise MisconfigurationTypeError(
                f"{name} got a set with {wrong[0]!r}, which is no class of modules. Give classes, such as "
                "{nn.TransformerEncoderLayer}."
            )
    elif _is_module_class(policy) or not callable(policy):
        raise MisconfigurationTypeError(
            f"{name}={policy!r} is neither a set of module classes nor a function. Give a set, such as "
            "{nn.TransformerEncoderLayer}, or a policy of torch.distributed.fsdp.wrap."
        )


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def chosen(policy: Policy, root: nn.Module) -> list[nn.Module]:
    """The modules inside ``root`` that ``policy`` chooses, those inside others first; never ``root`` itself.

    Raises:
        MisconfigurationException: a ``CustomPolicy`` wants options of its own for one of them.
    """
    if isinstance(policy, CustomPolicy):
        # Its only entry point; with no option of the root's, any option found is one of the policy's own.
        found = cast("dict[nn.Module, dict[str, Any]]", cast("Any", policy)._run_policy(root, set(), {}))
        special = next((options for options in found.values() if options), None)
        if special is not None:
            raise MisconfigurationException(
                f"auto_wrap_policy chose the options {special!r} for one module. All modules are sharded alike here: "
                "let the policy answer True or False."
            )
        picked: AbstractSet[nn.Module] = found.keys()
    elif isinstance(policy, AbstractSet):
        classes = tuple(cast("Iterable[type[nn.Module]]", policy))
        picked = {module for module in root.modules() if isinstance(module, classes)}
    elif _takes_module_alone(policy):
        picked = {module for module in root.modules() if policy(module)}
    else:
        picked = set()
        _follow(policy, root, picked, set())
    return [module for module in _inside_out(root) if module in picked and module is not root]


def _takes_module_alone(policy: Callable[..., Any]) -> bool:
    parameters = inspect.signature(policy).parameters.values()
    required = [one for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return len(required) == 1 and required[0].kind is not inspect.Parameter.VAR_POSITIONAL


def _follow(policy: Callable[..., Any], module: nn.Module, picked: set[nn.Module], seen: set[nn.Module]) -> int:
    """Ask a policy of torch's kind, which may look at the elements that no inner unit has; returns those in units."""
    seen.add(module)
    elements = sum(parameter.numel() for parameter in module.parameters())
    if not policy(module=module, recurse=True, nonwrapped_numel=elements):
        return 0
    inner = sum(_follow(policy, child, picked, seen) for child in module.children() if child not in seen)
    if policy(module=module, recurse=False, nonwrapped_numel=elements - inner):
        picked.add(module)
        return elements
    return inner


def _inside_out(root: nn.Module) -> Iterable[nn.Module]:
    return reversed(list(root.modules()))


def mark_as_unit(module: nn.Module, **options: object) -> nn.Module:
    """What ``torch.distributed.fsdp.wrap.wrap`` does inside ``configure_model``: remember that this is to be one unit.

    Raises:
        MisconfigurationException: ``wrap`` was given options.
    """
    if options:
        raise MisconfigurationException(
            f"wrap() got {', '.join(map(repr, options))}. All modules are sharded alike here: set them on FSDPStrategy."
        )
    module.__dict__[_UNIT] = True
    return module


def marked_units(root: nn.Module) -> list[nn.Module]:
    """The modules inside ``root`` that ``wrap`` has marked, those inside others first."""
    return [module for module in _inside_out(root) if module is not root and _UNIT in module.__dict__]


def without_shared(units: list[nn.Module], root: nn.Module) -> list[nn.Module]:
    """``units`` less those that share a parameter with a module outside: both must be gathered at the same time."""
    units = list(units)
    while True:
        homes = _homes(units, root)
        crossing = {unit for found in homes.values() if len(found) > 1 for unit in found if unit is not root}
        if not crossing:
            return units
        named = cast("Iterable[tuple[str, nn.Module]]", root.named_modules())
        names = {module: name for name, module in named}
        warnings.warn(
            f"{', '.join(sorted(names[unit] for unit in crossing))} share parameters with modules outside, so they are "
            "not sharded as units of their own but with the rest of the model.",
            stacklevel=2,
        )
        units = [unit for unit in units if unit not in crossing]


def _homes(units: list[nn.Module], root: nn.Module) -> dict[Tensor, set[nn.Module]]:
    """Of each parameter, the innermost units (or ``root``) in which it is found."""
    homes: dict[Tensor, set[nn.Module]] = {}
    wanted = set(units)

    def visit(module: nn.Module, home: nn.Module, seen: set[nn.Module]) -> None:
        if module in seen:
            return
        seen.add(module)
        home = module if module in wanted else home
        for parameter in module.parameters(recurse=False):
            homes.setdefault(parameter, set()).add(home)
        for child in module.children():
            visit(child, home, seen)

    visit(root, root, set())
    return homes


def recompute(policy: Policy, root: nn.Module) -> list[nn.Module]:
    """Let the chosen modules forget their activations and compute them again in backward. Returns them.

    Only ``forward`` is replaced: names in the module tree stay as they are. Where something is recomputed already,
    nothing is changed, with a warning.
    """
    if any(isinstance(module, CheckpointWrapper) or _RECOMPUTED in module.__dict__ for module in root.modules()):
        warnings.warn(
            "activation_checkpointing_policy is not applied: the model has activation checkpointing already.",
            stacklevel=2,
        )
        return []
    modules = chosen(policy, root)
    for module in modules:
        module.__dict__["forward"] = _recomputed(module.forward)
        module.__dict__[_RECOMPUTED] = True
    return modules


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # A function of its own, which torch.compile sees: nothing is compiled inside of checkpoint where that is called
    # by code that is not.
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(  # pyright: ignore[reportUnknownVariableType]
            forward, *args, use_reentrant=False, **kwargs
        )

    return recomputed
