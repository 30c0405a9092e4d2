"""The sample that a module is exported with, and the same sample in other sizes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

__all__ = ["Inputs", "tensors_in", "tiled"]


@dataclass(frozen=True)
class Inputs:
    """Arguments of a module's ``forward``."""

    signature: inspect.Signature
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @classmethod
    def of(
        cls, what: str, module: nn.Module, args: tuple[object, ...] | None, kwargs: Mapping[str, object] | None
    ) -> Inputs:
        """The sample, its keywords in the order of the signature.

        Raises:
            MisconfigurationException: there is none, or ``forward`` does not take such arguments.
        """
        name = type(module).__name__
        if args is None and kwargs is None:
            raise MisconfigurationException(
                f"{what} runs {name}.forward once, and was given args=None and kwargs=None. "
                "Give a sample of its arguments: args=(tensor,), or args=() for a forward that takes none."
            )
        if args is not None and not isinstance(cast("object", args), tuple):
            raise MisconfigurationException(
                f"{what} got args of type {type(args).__name__}. Give a tuple of {name}.forward's positional arguments."
            )
        signature = inspect.signature(module.forward)
        try:
            bound = signature.bind(*(args or ()), **(kwargs or {}))
        except TypeError as error:
            raise MisconfigurationException(
                f"{what} got a sample that does not fit {name}.forward{signature}: {error}. "
                "Give the arguments of forward, as a tuple (args) and a dict of names (kwargs)."
            ) from error
        order = [*bound.arguments, *(kwargs or {})]
        return cls(
            signature, tuple(args or ()), dict(sorted((kwargs or {}).items(), key=lambda kv: order.index(kv[0])))
        )

    def named(self) -> dict[str, object]:
        """The arguments by the names of ``forward``'s parameters."""
        return dict(self.signature.bind(*self.args, **self.kwargs).arguments)

    def renamed(self, named: Mapping[str, object]) -> Inputs:
        """The same split into positional and keyword arguments, with the values of ``named``."""
        args: list[object] = []
        rest: Mapping[str, object] = {}
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                rest = cast("Mapping[str, object]", named.get(parameter.name, {}))
            elif parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(cast("Sequence[object]", named.get(parameter.name, ())))
            elif len(args) < len(self.args):
                args.append(named[parameter.name])
        return Inputs(self.signature, tuple(args), {name: named.get(name, rest.get(name)) for name in self.kwargs})

    def leaves(self) -> list[object]:
        """Every value in the nested arguments, positional ones first."""
        return list(pytree.tree_leaves((self.args, dict(self.kwargs))))

    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def replaced(self, leaves: Sequence[object]) -> Inputs:
        """The same nesting with other leaves."""
        _, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        args, kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", pytree.tree_unflatten(list(leaves), spec))
        return Inputs(self.signature, args, kwargs)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same nesting with ``function`` applied to every tensor."""
        return self.replaced([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves()])

    def copied(self) -> Inputs:
        """With tensors of its own, for a forward that writes into its arguments."""
        return self.mapped(lambda tensor: tensor.detach().clone())

    def shapes(self) -> str:
        """The shapes of the tensors, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors())


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested collections, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def tiled(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """``tensor`` with other sizes in some dimensions: its own entries, repeated, so that they stay valid indices."""
    for dim, size in sizes.items():
        have = tensor.shape[dim]
        if have != size and have > 0:
            tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % have)
    return tensor
