"""From ``ModelPruning``'s arguments to what ``torch.nn.utils.prune`` is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import nn
from torch.nn.utils import prune

from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError, did_you_mean

__all__ = ["PARAMETER_NAMES", "ParameterList", "PruningMethod", "check_parameters", "pruning_method"]

ParameterList = Sequence[tuple[nn.Module, str]]

PARAMETER_NAMES = ("weight", "bias")

_FUNCTIONS: dict[str, Callable[..., object]] = {
    "ln_structured": prune.ln_structured,
    "l1_unstructured": prune.l1_unstructured,
    "random_structured": prune.random_structured,
    "random_unstructured": prune.random_unstructured,
}
_METHODS: dict[str, type[prune.BasePruningMethod]] = {
    "ln_structured": prune.LnStructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}


@dataclass(frozen=True)
class PruningMethod:
    """How to prune, for one parameter at a time or for all of them together."""

    name: str
    function: Any
    """For all together a class of ``torch.nn.utils.prune``; else called with ``(module, name=..., amount=...)``."""
    is_global: bool
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the class's ``__init__``, but for the amount."""

    def apply(self, parameters: ParameterList, amount: float) -> None:
        """Prune ``amount`` of ``parameters``: a fraction or a number of their entries."""
        if self.is_global:
            taken = inspect.signature(self.function).parameters
            options = {key: value for key, value in {**self.options, "amount": amount}.items() if key in taken}
            prune.global_unstructured(list(parameters), pruning_method=self.function, **options)
            return
        for module, name in parameters:
            self.function(module, name=name, amount=amount)


def pruning_method(pruning_fn: object, *, is_global: bool, dim: int | None, norm: int | None) -> PruningMethod:
    """The method that ``pruning_fn`` names or is.

    Raises:
        MisconfigurationException: there is none of that name, or it lacks an argument, or it cannot prune globally.
        MisconfigurationTypeError: ``pruning_fn`` is neither a name nor a pruning method.
    """
    if isinstance(pruning_fn, str):
        name, options = pruning_fn.lower(), dict[str, Any]()
        if name not in _FUNCTIONS:
            raise MisconfigurationException(
                f"ModelPruning(pruning_fn={pruning_fn!r}): there is no such function.{did_you_mean(name, _FUNCTIONS)} "
                f"Use one of {', '.join(_FUNCTIONS)}, or a subclass of torch.nn.utils.prune.BasePruningMethod."
            )
        if name.endswith("_structured"):
            if dim is None:
                raise MisconfigurationException(
                    f"ModelPruning(pruning_fn={pruning_fn!r}) prunes along a dimension, and pruning_dim=None. Give "
                    "pruning_dim."
                )
            options["dim"] = dim
        if name == "ln_structured":
            if norm is None:
                raise MisconfigurationException(
                    f"ModelPruning(pruning_fn={pruning_fn!r}) compares norms, and pruning_norm=None. Give "
                    "pruning_norm, the n of the L_n norm."
                )
            options["n"] = norm
        chosen: Any = _METHODS[name] if is_global else partial(_FUNCTIONS[name], **options)
        found = PruningMethod(_METHODS[name].__name__ if is_global else name, chosen, is_global, options)
    elif inspect.isclass(pruning_fn) and issubclass(pruning_fn, prune.BasePruningMethod):
        if not is_global:
            raise MisconfigurationException(
                f"ModelPruning(pruning_fn={pruning_fn.__name__}, use_global_unstructured=False): a class prunes "
                "globally only. Use a name, or use_global_unstructured=True."
            )
        found = PruningMethod(pruning_fn.__name__, pruning_fn, is_global)
    else:
        raise MisconfigurationTypeError(
            f"ModelPruning(pruning_fn={pruning_fn!r}): give one of {', '.join(_FUNCTIONS)}, or a subclass of "
            "torch.nn.utils.prune.BasePruningMethod (the class, no instance)."
        )
    if is_global and found.function.PRUNING_TYPE != "unstructured":
        raise MisconfigurationException(
            f"ModelPruning(pruning_fn={pruning_fn!r}, use_global_unstructured=True): its type is "
            f"{found.function.PRUNING_TYPE!r}, and only 'unstructured' can prune globally. Give "
            "use_global_unstructured=False."
        )
    return found


def check_parameters(
    model: nn.Module, given: object, names: Sequence[str], containers: tuple[type, ...]
) -> ParameterList:
    """``given`` if its parameters are the model's; all of the model's called ``names`` if nothing is given.

    Raises:
        MisconfigurationTypeError: ``given`` is no list of ``(module, name)``.
        MisconfigurationException: a module or a parameter is not there.
    """
    modules = [module for module in model.modules() if not isinstance(module, containers)]
    if not given:
        return [
            (module, name)
            for name in names
            for module in modules
            if isinstance(getattr(module, name, None), nn.Parameter)
        ]
    pairs = cast("Sequence[object]", given) if isinstance(given, (list, tuple)) else None
    if pairs is None or not all(_is_pair(pair) for pair in pairs):
        raise MisconfigurationTypeError(
            f"ModelPruning(parameters_to_prune={given!r}): give a list of (nn.Module, name of its parameter), or () "
            "for all."
        )
    known = {id(module) for module in modules}
    for module, name in cast("ParameterList", pairs):
        if id(module) not in known:
            raise MisconfigurationException(
                f"ModelPruning(parameters_to_prune=...) holds {module!r}, which is no layer of "
                f"{type(model).__name__}. Give layers of the model that is fitted."
            )
        if getattr(module, name, None) is None:
            raise MisconfigurationException(
                f"ModelPruning(parameters_to_prune=...) holds {name!r} of {module!r}, which has no such parameter."
                f"{did_you_mean(name, dict(module.named_parameters(recurse=False)))}"
            )
    return cast("ParameterList", pairs)


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, (list, tuple)):
        return False
    items = cast("Sequence[object]", pair)
    return len(items) == 2 and isinstance(items[0], nn.Module) and isinstance(items[1], str)
