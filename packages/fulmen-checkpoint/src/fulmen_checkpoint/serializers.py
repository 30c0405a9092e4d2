"""Objects of users' classes in checkpoints: registered by name, stored as plain data, made anew when loaded."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast, final

from fulmen_protocols.errors import CheckpointError, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["PackedObject", "pack", "register_serializer", "unpack"]

T = TypeVar("T")

NAMES: Final = "fulmen_serializers"
"""The entry of a checkpoint that names the serializers it was saved with; there only if there were any."""

_NAME, _VALUE = "fulmen.serializer", "value"
_CONTAINERS: Final[frozenset[type]] = frozenset({dict, OrderedDict, Counter, list, tuple})
_NUMBERS_AND_TEXTS: Final[frozenset[type]] = frozenset({int, float, str})


class PackedObject:
    """What an object of an unknown serializer is loaded as; it is saved again as it was."""

    def __init__(self, name: str, value: object) -> None:
        self.name = name
        self.value = value

    def __repr__(self) -> str:
        return f"PackedObject({self.name!r}, {self.value!r})"


@dataclass(frozen=True)
class _Serializer(Generic[T]):
    name: str
    kind: type[T]
    to_plain: Callable[[T], object]
    from_plain: Callable[[Any], T]


_by_name: dict[str, _Serializer[Any]] = {}
_by_kind: dict[type, _Serializer[Any]] = {}


def register_serializer(
    name: str, kind: type[T], to_plain: Callable[[T], object], from_plain: Callable[[Any], T]
) -> None:
    """Let checkpoints hold objects of a class, in every format.

    A file holds the name and the plain data, never code: which function makes the object again is decided by what the
    loading process has registered under that name. Plain ``torch.load(weights_only=True)`` sees a dict with both.

    Args:
        name: for the files, unique and lasting: ``"acme.Vocabulary"``. Registering it again for a class of the same
            name replaces it.
        kind: exactly this class; subclasses are registered for themselves.
        to_plain: gives tensors, numbers, texts, lists and dicts; objects of registered classes among them are fine.
        from_plain: makes an equal object of what ``to_plain`` gave.

    Raises:
        MisconfigurationException: the name or the class is taken, or the name is empty.
    """
    if not name:
        raise MisconfigurationException(
            f"register_serializer got name={name!r}. Give one that will not change, such as {_full_name(kind)!r}."
        )
    for taken in (_by_name.get(name), _by_kind.get(kind)):
        if taken is not None and (taken.name, _full_name(taken.kind)) != (name, _full_name(kind)):
            raise MisconfigurationException(
                f"register_serializer got name={name!r} for {_full_name(kind)}, but {taken.name!r} is registered for "
                f"{_full_name(taken.kind)}. Names and classes go together once: choose another name."
            )
    made = _Serializer(name, kind, to_plain, from_plain)
    _by_name[name] = _by_kind[kind] = made


def pack(checkpoint: Mapping[str, object]) -> Mapping[str, object]:
    """``checkpoint`` with plain data in place of registered objects; itself if there are none. It is left as it is.

    Raises:
        CheckpointError: ``to_plain`` of one of them failed; the message names its place.
    """
    if not _by_kind:
        return checkpoint
    names: set[str] = set()

    def replacement(value: Any, place: str) -> object:
        serializer = _by_kind[type(value)]
        name = value.name if isinstance(value, PackedObject) else serializer.name
        try:
            plain = serializer.to_plain(value)
        except Exception as error:
            raise _failed("to_plain", name, place, error) from error
        names.add(name)
        return {_NAME: name, _VALUE: walk(plain, f"{place}.{_VALUE}")}

    walk = _Walk(lambda value: type(value) in _by_kind, replacement)
    packed = cast("dict[str, object]", walk(dict(checkpoint), ""))
    if not names:
        return checkpoint
    before = cast("list[str]", checkpoint.get(NAMES, []))
    return {**packed, NAMES: sorted({*before, *names})}


def unpack(checkpoint: dict[str, object], path: str) -> dict[str, object]:
    """What ``pack`` was given; objects of serializers that are unknown here are ``PackedObject``, with a warning.

    Raises:
        CheckpointError: ``from_plain`` of one of them failed; the message names its place.
    """
    if checkpoint.pop(NAMES, None) is None:
        return checkpoint
    unknown: set[str] = set()

    def replacement(value: Any, place: str) -> object:
        name, plain = str(value[_NAME]), walk(value[_VALUE], f"{place}.{_VALUE}")
        serializer = _by_name.get(name)
        if serializer is None:
            unknown.add(name)
            return PackedObject(name, plain)
        try:
            return serializer.from_plain(plain)
        except Exception as error:
            raise _failed("from_plain", name, f"{place} of {path!r}", error) from error

    walk = _Walk(_is_packed, replacement)
    found = cast("dict[str, object]", walk(checkpoint, ""))
    if unknown:
        _by_kind.setdefault(PackedObject, _PACKED)
        warnings.warn(
            f"{path!r} holds objects of {', '.join(map(repr, sorted(unknown)))}, whose serializers are not registered "
            "here: they are loaded as fulmen_checkpoint.PackedObject. Import what registers them, or call "
            "fulmen_checkpoint.register_serializer, before loading.",
            stacklevel=4,
        )
    return found


@final
class _Walk:
    """Goes through containers, and copies those in which something is replaced; what is shared stays shared."""

    def __init__(self, replaces: Callable[[object], bool], replacement: Callable[[Any, str], object]) -> None:
        self._replaces = replaces
        self._replacement = replacement
        self._made: dict[int, tuple[object, object]] = {}
        """By id of what was met: that, so that its id stays taken, and what stands for it."""
        self._within: set[int] = set()

    def __call__(self, value: object, place: str) -> object:
        replaces = self._replaces(value)
        if not (replaces or type(value) in _CONTAINERS):
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        if id(value) in self._within:  # a container that holds itself
            return value
        self._within.add(id(value))
        made = self._replacement(value, place) if replaces else self._container(value, place)
        self._within.remove(id(value))
        self._made[id(value)] = value, made
        return made

    def _container(self, value: object, place: str) -> object:
        if isinstance(value, dict):
            table = cast("dict[object, object]", value)
            items = [(key, item, self(item, f"{place}[{key!r}]")) for key, item in table.items()]
            changed = {key: new for key, item, new in items if new is not item}
            if changed:
                table = copy.copy(table)  # with its attributes and its order
                table.update(changed)
            return table
        sequence = cast("list[object] | tuple[object, ...]", value)
        if set(map(type, sequence)) <= _NUMBERS_AND_TEXTS:  # a sampler's order may have millions
            return sequence
        walked = [self(item, f"{place}[{index}]") for index, item in enumerate(sequence)]
        if all(new is item for new, item in zip(walked, sequence, strict=True)):
            return sequence
        return walked if isinstance(sequence, list) else tuple(walked)


def _is_packed(value: object) -> bool:
    return type(value) is dict and cast("dict[object, object]", value).keys() == {_NAME, _VALUE}


def _failed(function: str, name: str, place: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{function} of the serializer {name!r} failed for {place}: {type(error).__name__}: {error}. Mend what "
        "register_serializer was given."
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


_PACKED: Final = _Serializer("", PackedObject, lambda packed: packed.value, lambda plain: PackedObject("", plain))
