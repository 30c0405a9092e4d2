"""Reading the ``devices=`` argument of accelerators whose devices have ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["parse_device_ids"]

_GRAMMAR = "Pass a count (2), a list of ids ([0, 2] or '0,2'), or -1 for all."


def parse_device_ids(
    devices: int | str | Sequence[int], available: Sequence[int], *, kind: str, hint: str = "", unchecked: bool = False
) -> list[int]:
    """Turn ``devices`` into ids of ``available``.

    Args:
        devices: a count, a sequence of ids, or either as text; ``"3"`` is a count, ``"3,"`` an id, -1 stands for all.
        available: ids that exist.
        kind: how messages call such a device, ``"CUDA"`` for example.
        hint: what messages add about the devices that exist.
        unchecked: whether ids outside ``available`` are allowed.

    Raises:
        TypeError: not a count, text or sequence of ids.
        ValueError: the text is not understood, no device is named, one is named twice or one does not exist.
    """
    asked = f"devices={devices!r}"
    count: int | None = None
    ids: list[int] = []
    # bool is an int to Python; devices=True is a mistake to everybody else.
    if type(devices) is int:
        count = devices
    elif isinstance(devices, str):
        count, ids = _read(devices, asked)
    elif isinstance(devices, (list, tuple)):
        ids = _check_ids(cast("Sequence[object]", devices), asked)
    else:
        raise MisconfigurationTypeError(f"{asked} is a {type(devices).__name__}. {_GRAMMAR}")

    if (count is None and not ids) or count == 0:
        raise MisconfigurationException(f"{asked} names no {kind} device. {_GRAMMAR}")
    if (count is not None and count < -1) or any(index < 0 for index in ids):
        raise MisconfigurationException(f"{asked} has a negative number. {_GRAMMAR}")
    twice = sorted({index for index in ids if ids.count(index) > 1})
    if twice:
        raise MisconfigurationException(f"{asked} names {kind} device {twice[0]} more than once. {_GRAMMAR}")

    if not available:
        raise MisconfigurationException(f"{asked} asks for {kind} devices; this machine has none that is usable.{hint}")
    if count == -1:
        return list(available)
    wanted = ids if count is None else list(range(count)) if unchecked else list(available[:count])
    if unchecked:
        return wanted
    exist = f"this machine has {len(available)}: {', '.join(map(str, available))}.{hint}"
    if count is not None and count > len(available):
        raise MisconfigurationException(f"{asked} asks for {count} {kind} devices; {exist}")
    absent = [index for index in wanted if index not in available]
    if absent:
        noun = "device" if len(absent) == 1 else "devices"
        raise MisconfigurationException(f"{asked} names {kind} {noun} {', '.join(map(str, absent))}; {exist}")
    return wanted


def _read(text: str, asked: str) -> tuple[int | None, list[int]]:
    """A count, or a list of ids where there is a comma."""
    try:
        if "," in text:
            return None, [int(part) for part in text.split(",") if part.strip()]
        return int(text), []
    except ValueError:
        raise MisconfigurationException(f"{asked} is not understood. {_GRAMMAR}") from None


def _check_ids(values: Sequence[object], asked: str) -> list[int]:
    ids: list[int] = []
    for value in values:
        if type(value) is not int:
            raise MisconfigurationTypeError(
                f"{asked} holds {value!r}, a {type(value).__name__}: device ids are integers. {_GRAMMAR}"
            )
        ids.append(value)
    return ids
