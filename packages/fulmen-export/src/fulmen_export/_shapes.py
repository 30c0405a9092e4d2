"""Which dimensions of the inputs may have other sizes, as people write it and as torch takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.export import Dim

from fulmen_export._inputs import tiled
from fulmen_protocols.errors import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.export import ExportedProgram

    from fulmen_export._inputs import Inputs

__all__ = ["Shapes", "other_sizes"]

_HINT = type(Dim.AUTO)


class Shapes:
    """The dynamic dimensions of a sample: for each parameter of ``forward`` its nesting, with dimensions at the leaves.

    Args:
        what: the exporter, for messages.
        inputs: the sample.
        dynamic_shapes: see ``Exporter.export``.
    """

    def __init__(self, what: str, inputs: Inputs, dynamic_shapes: object) -> None:
        named = inputs.named()
        self.by_name: dict[str, object] | None
        if dynamic_shapes is None:
            self.by_name = None
        elif dynamic_shapes == "batch":
            self.by_name = {name: _nested(value, _first) for name, value in named.items()}
        elif isinstance(dynamic_shapes, Mapping):
            self.by_name = dict(cast("Mapping[str, object]", dynamic_shapes))
        elif isinstance(dynamic_shapes, (tuple, list)):
            self.by_name = dict(zip(named, cast("Sequence[object]", dynamic_shapes), strict=False))
        else:
            raise MisconfigurationException(
                f"{what} got dynamic_shapes={dynamic_shapes!r}. Give 'batch' for the first dimension of every tensor, "
                "or a dict such as {'x': {0: 'batch'}} from the names of forward's arguments to their dimensions."
            )
        unknown = [name for name in self.by_name or {} if name not in named]
        if unknown:
            raise MisconfigurationException(
                f"{what} got dynamic_shapes for {unknown[0]!r}, which is no argument of the sample."
                f"{did_you_mean(unknown[0], named)} The sample has: {', '.join(named)}."
            )

    @classmethod
    def of_axes(
        cls, what: str, inputs: Inputs, axes: Mapping[str, object], input_names: Sequence[str], outputs: Sequence[str]
    ) -> Shapes:
        """From ``dynamic_axes``, the older way to say it: the name of each input (or output) to its dimensions."""
        named = inputs.named()
        names = list(input_names) or list(named)
        unknown = [name for name in axes if name not in names and name not in outputs]
        if unknown:
            raise MisconfigurationException(
                f"{what} got dynamic_axes for {unknown[0]!r}, which is neither an input nor an output."
                f"{did_you_mean(unknown[0], [*names, *outputs])} Inputs: {', '.join(names)}."
            )
        order = iter(names)

        def leaf(tensor: Tensor) -> object:
            found = axes.get(next(order, ""))
            if found is None or isinstance(found, Mapping):
                return cast("object", found)
            return {dim: f"dim_{dim}" for dim in cast("Sequence[int]", found)}

        return cls(what, inputs, {name: _nested(value, leaf) for name, value in named.items()})

    def for_capture(self) -> dict[str, object] | None:
        """As ``torch.export.export`` takes it."""
        return None if self.by_name is None else {k: _dims(v, _as_dim) for k, v in self.by_name.items()}

    def names(self) -> dict[str, object] | None:
        """As ``torch.onnx.export`` takes it, to name the dynamic dimensions; None when they have no names."""
        return self.by_name if self.by_name is not None and _has_names(self.by_name) else None

    def at_least_two(self, inputs: Inputs) -> Inputs:
        """The sample with dynamic dimensions of size 1 doubled: torch takes a size of 1 for a constant."""
        return self._resized(inputs, lambda size: max(size, 2))

    def grown(self, inputs: Inputs) -> Inputs | None:
        """The sample with all dynamic dimensions doubled; None when there are none."""
        other = self._resized(inputs, lambda size: 2 * size)
        return None if _same_shapes(other, inputs) else other

    def _resized(self, inputs: Inputs, size: Callable[[int], int]) -> Inputs:
        if self.by_name is None:
            return inputs
        named = inputs.named()
        return inputs.renamed({name: _resize(value, self.by_name.get(name), size) for name, value in named.items()})


def other_sizes(program: ExportedProgram, inputs: Inputs) -> Inputs | None:
    """The sample with every dimension that ``program`` leaves open in another size, within its limits.

    None when all are fixed, or can have no other size.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves = inputs.leaves()
    open_: list[dict[int, Any]] = []  # for each leaf: dimension -> sympy expression
    sizes: dict[Any, int] = {}  # symbol -> the sample's size
    for name, leaf in zip(program.graph_signature.user_inputs, leaves, strict=True):
        value = values.get(name) if isinstance(name, str) else None
        dims: dict[int, Any] = {}
        if isinstance(value, Tensor) and isinstance(leaf, Tensor):
            for dim, size in enumerate(cast("Sequence[object]", value.shape)):
                if isinstance(size, torch.SymInt):
                    dims[dim] = cast("Any", size).node.expr
                    if dims[dim].is_Symbol:
                        sizes[dims[dim]] = leaf.shape[dim]
        open_.append(dims)
    new = {symbol: _another(size, program.range_constraints.get(symbol)) for symbol, size in sizes.items()}
    resized = [
        tiled(leaf, {dim: int(expr.subs(new)) for dim, expr in dims.items() if expr.free_symbols <= set(new)})
        if isinstance(leaf, Tensor)
        else leaf
        for leaf, dims in zip(leaves, open_, strict=True)
    ]
    other = inputs.replaced(resized)
    return None if _same_shapes(other, inputs) else other


def _another(size: int, limits: Any) -> int:
    # Doubling keeps whatever the size must be divisible by.
    for candidate in (2 * size, size + 1, size - 1):
        if limits is None or (bool(limits.lower <= candidate) and bool(candidate <= limits.upper)):
            return candidate
    return size


def _same_shapes(one: Inputs, other: Inputs) -> bool:
    return [t.shape for t in one.tensors()] == [t.shape for t in other.tensors()]


def _first(tensor: Tensor) -> object:
    return {0: "batch"} if tensor.dim() else None


def _nested(value: object, leaf: Callable[[Tensor], object]) -> object:
    """The nesting of ``value`` with ``leaf`` at its tensors and None at everything else."""
    if isinstance(value, Tensor):
        return leaf(value)
    if isinstance(value, Mapping):
        return {key: _nested(item, leaf) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        items = [_nested(item, leaf) for item in cast("Sequence[object]", value)]
        return items if isinstance(value, list) else tuple(items)
    return None


def _is_leaf(spec: object) -> bool:
    """Whether ``spec`` speaks of one tensor: dimensions by number, or one entry for each."""
    if isinstance(spec, Mapping):
        return all(isinstance(key, int) for key in cast("Mapping[object, object]", spec))
    if isinstance(spec, (list, tuple)):
        entries = cast("Sequence[object]", spec)
        return all(entry is None or isinstance(entry, (int, str, _HINT)) or _is_dim(entry) for entry in entries)
    return spec is None


def _is_dim(entry: object) -> bool:
    return isinstance(entry, cast("Any", Dim))


def _as_dim(entry: object) -> object:
    return Dim.DYNAMIC if isinstance(entry, str) else entry


def _dims(spec: object, change: Callable[[object], object]) -> object:
    """``spec`` with ``change`` applied to the entry of each dimension."""
    if isinstance(spec, Mapping):
        entries = cast("Mapping[object, object]", spec)
        leaf = _is_leaf(entries)
        return {key: change(entry) if leaf else _dims(entry, change) for key, entry in entries.items()}
    if isinstance(spec, (list, tuple)):
        items = cast("Sequence[object]", spec)
        leaf = _is_leaf(items)
        changed = [change(item) if leaf else _dims(item, change) for item in items]
        return changed if isinstance(spec, list) else tuple(changed)
    return spec


def _has_names(spec: object) -> bool:
    found: list[object] = []
    _dims(spec, lambda entry: found.append(entry))
    return any(isinstance(entry, str) or _is_dim(entry) for entry in found)


def _resize(value: object, spec: object, size: Callable[[int], int]) -> object:
    if spec is None:
        return value
    if isinstance(value, Tensor):
        dims = cast("Mapping[int, object]", spec)
        if not isinstance(spec, Mapping):
            dims = dict(enumerate(cast("Sequence[object]", spec)))
        return tiled(value, {dim: size(value.shape[dim]) for dim, entry in dims.items() if _is_dynamic(entry)})
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value)
        specs = cast("Mapping[object, object]", spec)
        return {key: _resize(item, specs.get(key), size) for key, item in items.items()}
    if isinstance(value, (list, tuple)):
        pairs = zip(cast("Sequence[object]", value), cast("Sequence[object]", spec), strict=False)
        resized = [_resize(item, entry, size) for item, entry in pairs]
        if isinstance(value, list):
            return resized
        kind: Any = type(cast("object", value))
        return kind(*resized) if hasattr(kind, "_fields") else tuple(resized)
    return value


def _is_dynamic(entry: object) -> bool:
    return entry is not None and not isinstance(entry, int) and entry is not Dim.STATIC
