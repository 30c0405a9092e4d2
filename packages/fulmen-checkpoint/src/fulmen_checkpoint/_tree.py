"""A checkpoint as JSON with the tensors taken out, and back: no pickle, so that nothing in a file can name code.

Plain JSON values stand for themselves. Everything else is an object with one or more keys that begin with ``$``:

    {"$tensor": "layer.weight"}          a tensor, kept elsewhere under that name
    {"$tuple": [...]}  {"$set": [...]}   their items
    {"$dict": [[key, value], ...]}       a dict with other keys than texts; "$ordered" and "$counter" likewise
    {"$float": "nan"}  {"$complex": [re, im]}  {"$bytes": base64}  {"$bytearray": base64}
    {"$size": [...]}  {"$dtype": "float32"}  {"$device": "cuda:0"}  {"$layout": "strided"}
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from fulmen_protocols.errors import CheckpointUnsafe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["DTYPES", "dtype_name", "flatten", "place_of", "rebuild"]

Path = tuple[object, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


DTYPES: Final[dict[str, torch.dtype]] = {
    dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
_LAYOUTS: Final[dict[str, torch.layout]] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.layout)
}
_PLAIN: Final[frozenset[type]] = frozenset({type(None), bool, int, str})
_GREATEST_INT = 1 << 2000  # as in torch's own restricted reader


class _Encoder:
    def __init__(self, target: str) -> None:
        self.target = target
        self.tensors: dict[str, Tensor] = {}
        self.paths: dict[str, Path] = {}
        self._names: dict[int, str] = {}
        self._within: set[int] = set()

    def encode(self, value: object, path: Path) -> object:
        kind = type(value)
        if kind in _PLAIN:
            if kind is int and not -_GREATEST_INT < cast("int", value) < _GREATEST_INT:
                raise self._refused(path, "an int of more than 2000 bits")
            return value
        if kind is float:
            number = cast("float", value)
            return number if math.isfinite(number) else {"$float": repr(number)}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if id(value) in self._within:
            raise self._refused(path, "a container that holds itself")
        self._within.add(id(value))
        try:
            return self._other(value, kind, path)
        finally:
            self._within.remove(id(value))

    def _other(self, value: object, kind: type, path: Path) -> object:
        if kind is list:
            return self._items(cast("list[object]", value), path)
        if kind is tuple:
            return {"$tuple": self._items(cast("tuple[object, ...]", value), path)}
        if kind is set:
            return {"$set": self._items(cast("set[object]", value), path)}
        if kind is dict:
            return self._dict(cast("dict[object, object]", value), path)
        if kind is OrderedDict or kind is Counter:
            pairs = self._pairs(cast("dict[object, object]", value), path)
            node: dict[str, object] = {"$ordered" if kind is OrderedDict else "$counter": pairs}
            attributes = cast("dict[str, object]", vars(value))  # a module's state_dict carries its versions so
            if attributes:
                node["$attributes"] = self._dict(cast("dict[object, object]", attributes), path)
            return node
        if kind is complex:
            number = cast("complex", value)
            return {"$complex": [self.encode(number.real, path), self.encode(number.imag, path)]}
        if kind is bytes or kind is bytearray:
            return {f"${kind.__name__}": base64.b64encode(cast("bytes", value)).decode("ascii")}
        if kind is torch.Size:
            return {"$size": list(cast("torch.Size", value))}
        if kind is torch.dtype:
            return {"$dtype": dtype_name(cast("torch.dtype", value))}
        if kind is torch.device:
            return {"$device": str(value)}
        if kind is torch.layout:
            return {"$layout": str(value).removeprefix("torch.")}
        raise self._refused(path, f"{kind.__module__}.{kind.__qualname__}")

    def _items(self, values: Iterable[object], path: Path) -> list[object]:
        return [self.encode(item, (*path, index)) for index, item in enumerate(values)]

    def _dict(self, value: dict[object, object], path: Path) -> object:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        return {"$dict": self._pairs(value, path)}

    def _pairs(self, value: dict[object, object], path: Path) -> list[list[object]]:
        return [[self.encode(key, (*path, key)), self.encode(item, (*path, key))] for key, item in value.items()]

    def _tensor(self, value: Tensor, path: Path) -> object:
        # DTensor and other subclasses come here too; what the file format cannot hold it refuses itself.
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise self._refused(path, f"a {'quantized' if value.is_quantized else value.layout} tensor")
        name = self._names.get(id(value))
        if name is None:
            name = self._fresh(path)
            self.tensors[name] = value
            self.paths[name] = path
            self._names[id(value)] = name
        node: dict[str, object] = {"$tensor": name}
        if isinstance(value, nn.Parameter):
            node["$parameter"] = value.requires_grad
        elif value.requires_grad and value.is_leaf:
            node["$requires_grad"] = True
        if vars(value) and type(value) in (Tensor, nn.Parameter):
            node["$attributes"] = self._dict(cast("dict[object, object]", vars(value)), path)
        return node

    def _fresh(self, path: Path) -> str:
        """Weights go by their own names, so that other readers of the format find them."""
        parts = path[1:] if len(path) > 1 and path[0] == "state_dict" else path
        base = ".".join(str(part) for part in parts) or "tensor"
        if base.startswith("__"):  # "__metadata__" is the format's own
            base = f".{base}"
        name, count = base, 2
        while name in self.tensors:
            name, count = f"{base}~{count}", count + 1
        return name

    def _refused(self, path: Path, what: str) -> CheckpointUnsafe:
        return CheckpointUnsafe(
            f"the checkpoint {self.target!r} was not written: it holds {place_of(path)}: {what}, and this format keeps "
            "tensors and plain data only. Store plain data instead (x.item(), str(path), asdict(config)), or register "
            "the class with fulmen_checkpoint.register_serializer(...)."
        )


def place_of(path: Path) -> str:
    """``callbacks.EarlyStopping.state[0]`` for the keys on the way there."""
    text = ""
    for part in path:
        shown = f"[{part!r}]" if type(part) is not str else f".{part}" if text else part
        text += shown
    return text or "the checkpoint itself"


def flatten(checkpoint: Mapping[str, object], target: str) -> tuple[str, dict[str, Tensor], dict[str, Path]]:
    """The tree as JSON, the tensors by name, and each tensor's place.

    Names depend on nothing but the tree, so that ranks with the same tree give the same names.

    Raises:
        CheckpointUnsafe: an object in it is neither a tensor nor plain data; the message names its place.
    """
    encoder = _Encoder(target)
    tree = encoder.encode(dict(checkpoint), ())
    return json.dumps(tree, separators=(",", ":")), encoder.tensors, encoder.paths


def rebuild(text: str, tensor: Callable[[str], Tensor]) -> dict[str, object]:
    """The checkpoint of a tree; ``tensor`` gives the tensor of a name.

    Raises:
        ValueError: it is no such tree.
    """
    try:
        decoded = _Decoder(tensor).decode(json.loads(text))
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"the tree of the checkpoint ({type(error).__name__}: {error})") from error
    if type(decoded) is not dict:
        raise ValueError("the tree of the checkpoint (it is no dict)")
    return cast("dict[str, object]", decoded)


class _Decoder:
    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        self._tensor = tensor
        self._made: dict[str, Tensor] = {}

    def decode(self, node: object) -> object:
        if type(node) is list:
            return [self.decode(item) for item in cast("list[object]", node)]
        if type(node) is not dict:
            return node
        table = cast("dict[str, Any]", node)
        tag = next(iter(table), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in table.items()}
        if tag == "$tensor":
            return self._stored(table)
        made = self._container(tag, table[tag]) if tag in _CONTAINERS else _LEAVES[tag](table[tag])
        if "$attributes" in table:
            vars(made).update(cast("dict[str, object]", self.decode(table["$attributes"])))
        return made

    def _stored(self, table: Mapping[str, Any]) -> Tensor:
        name = table["$tensor"]
        if type(name) is not str:
            raise ValueError(f"the tree of the checkpoint (a tensor is named {name!r})")
        if name not in self._made:
            found = self._tensor(name)
            if "$parameter" in table:
                found = nn.Parameter(found, requires_grad=table["$parameter"] is True)
            elif table.get("$requires_grad") is True:
                found.requires_grad_()
            if "$attributes" in table:
                vars(found).update(cast("dict[str, object]", self.decode(table["$attributes"])))
            self._made[name] = found
        return self._made[name]

    def _container(self, tag: str, body: Any) -> object:
        if tag == "$tuple":
            return tuple(self.decode(item) for item in body)
        if tag == "$set":
            return {self.decode(item) for item in body}
        pairs = {self.decode(key): self.decode(item) for key, item in body}
        return pairs if tag == "$dict" else OrderedDict(pairs) if tag == "$ordered" else Counter(pairs)


def _number(value: Any) -> float:
    return float(cast("dict[str, str]", value)["$float"]) if isinstance(value, dict) else float(value)


_CONTAINERS: Final = frozenset({"$tuple", "$set", "$dict", "$ordered", "$counter"})
_LEAVES: Final[dict[str, Callable[[Any], object]]] = {
    "$float": float,
    "$complex": lambda body: complex(_number(body[0]), _number(body[1])),
    "$bytes": lambda body: base64.b64decode(body, validate=True),
    "$bytearray": lambda body: bytearray(base64.b64decode(body, validate=True)),
    "$size": torch.Size,
    "$dtype": DTYPES.__getitem__,
    "$device": torch.device,
    "$layout": _LAYOUTS.__getitem__,
}
