"""What loggers are given, as plain numbers, texts and containers."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from fulmen_protocols.errors import MisconfigurationException

__all__ = ["JOIN_CHAR", "as_mapping", "as_number", "flatten", "prefixed", "simplify"]

JOIN_CHAR = "-"
"""What stands between a logger's prefix and the name of a metric, unless its class says otherwise."""


class _HasItem(Protocol):
    def item(self) -> object: ...


def prefixed(prefix: str, join: str) -> str:
    """What to put before names: the user's ``prefix`` and a logger's ``LOGGER_JOIN_CHAR``, or nothing."""
    return f"{prefix}{join}" if prefix else ""


def as_number(name: str, value: object) -> float:
    """``value`` as a Python number: floats, ints, and tensors or arrays of one element.

    Raises:
        MisconfigurationException: it is no number, or several.
    """
    if isinstance(value, (float, int)):
        # A numpy float is a float too; its repr would not be one.
        return value if type(value) in (float, int) else float(value)
    item = getattr(value, "item", None)
    if callable(item):
        try:
            number = cast("_HasItem", value).item()
        except (RuntimeError, ValueError):  # more than one element
            shape = tuple(cast("tuple[int, ...]", getattr(value, "shape", ())))
            raise MisconfigurationException(
                f"metric {name!r} has shape {shape}, but only single numbers can be logged. "
                "Log its mean, or each element under a name of its own."
            ) from None
        if isinstance(number, (float, int)):
            return number
    raise MisconfigurationException(
        f"metric {name!r} is {value!r} of type {type(value).__name__}, but only numbers can be logged. "
        "Give a float, an int or a tensor of one element."
    )


def as_mapping(params: object) -> dict[str, object]:
    """Hyperparameters as a dict: from a mapping, a dataclass, or a namespace (argparse's, for example)."""
    if isinstance(params, Mapping):
        return {str(key): value for key, value in cast("Mapping[object, object]", params).items()}
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    if hasattr(params, "__dict__") and not isinstance(params, type):
        return {str(key): value for key, value in vars(params).items()}
    raise MisconfigurationException(
        f"log_hyperparams was given {params!r} of type {type(params).__name__}. "
        "Give a dict, a dataclass or a namespace."
    )


def simplify(value: object) -> object:
    """``value`` as YAML can hold it safely: containers and scalars stay, anything else becomes its text."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {_key(key): simplify(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [simplify(item) for item in cast("list[object]", value)]
    if isinstance(value, (set, frozenset)):
        return sorted((simplify(item) for item in cast("set[object]", value)), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return simplify(as_mapping(value))
    for base in (int, float, str):  # of a subclass only the value
        if isinstance(value, base):
            return base(cast("str", value))
    item = getattr(value, "item", None)
    if callable(item):
        try:
            number = cast("Callable[[], object]", item)()
        except (RuntimeError, ValueError, TypeError):
            return _text(value)
        return number if type(number) in (bool, int, float, str) else _text(value)
    return _text(value)


def flatten(params: Mapping[str, object], above: str = "") -> dict[str, object]:
    """Nested mappings as one level with names like ``net/width``; lists become text."""
    flat: dict[str, object] = {}
    for key, value in params.items():
        name = f"{above}/{key}" if above else str(key)
        if _is_nested(value):
            flat.update(flatten(cast("Mapping[str, object]", value), name))
        else:
            flat[name] = value if value is None or type(value) in (bool, int, float, str) else str(value)
    return flat


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and len(cast("Mapping[object, object]", value)) > 0


def _key(key: object) -> object:
    return key if type(key) in (bool, int, float, str) else str(key)


def _text(value: object) -> str:
    # The address in a function's repr would differ in every run.
    if callable(value):
        module = cast("object", getattr(value, "__module__", ""))
        name = cast("object", getattr(value, "__qualname__", ""))
        if name:
            return f"{module}.{name}" if module else f"{name}"
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a user's __str__ must not stop the run
        return f"<{type(value).__name__}>"
