"""Finding and replacing the linear layers of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

__all__ = ["has_bias", "linears", "replace", "sizes"]


def linears(module: nn.Module, ignore: Collection[str] = ()) -> Iterator[tuple[str, nn.Linear]]:
    """Every plain ``nn.Linear`` in ``module`` with its name; subclasses are somebody else's layers and are left out.

    Args:
        module: searched with its children; its own name is ``""``.
        ignore: names; a layer with such a name, or below such a module, is left out.
    """
    # A layer that is used in two places has two names, and is replaced in both.
    for name, layer in cast("Iterator[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False)):
        if type(layer) is nn.Linear and not any(name == each or name.startswith(f"{each}.") for each in ignore):
            yield name, layer


def replace(module: nn.Module, names: Collection[str], make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Put ``make(layer)`` in the place of each named layer; a layer used in several places stays one layer.

    Returns:
        ``module``, or what replaced it if it is itself a linear layer.
    """
    made: dict[int, nn.Module] = {}
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        new = made.setdefault(id(layer), make(layer))
        new.training = layer.training
        if not name:
            return new
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, new)
    return module


def has_bias(layer: nn.Module) -> bool:
    """Whether ``layer`` adds a bias; torch's annotations say that every one does."""
    return getattr(layer, "bias", None) is not None


def sizes(layers: list[tuple[str, nn.Linear]], shown: int = 3) -> str:
    """The largest layers, for a message: ``name (in x out)``."""
    largest = sorted(layers, key=lambda pair: -pair[1].in_features * pair[1].out_features)
    text = ", ".join(f"{name or 'itself'} ({one.in_features} x {one.out_features})" for name, one in largest[:shown])
    return f"{text}, ..." if len(layers) > shown else text
