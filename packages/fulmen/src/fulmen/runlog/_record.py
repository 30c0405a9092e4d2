"""The lines of a run's log: one JSON object each, with its ``kind`` and the time ``t`` in seconds since the epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Final, cast

__all__ = ["FILE", "FORMAT", "REPORT_FILE", "Record", "decode", "encode", "encode_row", "number", "plain"]

FILE: Final = "run.jsonl"
"""Name of the log in a run's folder."""

REPORT_FILE: Final = "report.html"
"""Name of the page that is made of it."""

FORMAT: Final = 1
"""Written in every ``begin`` record; a reader refuses what is newer."""

Record = dict[str, object]

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

_rows: dict[tuple[str, ...], str] = {}
"""By what a row is of, and its names: its line, with a place for each number."""

_SHAPES = 256
"""Of rows that are remembered; a run has a handful."""

_NUMBERS = {float, int}


def encode(record: Mapping[str, object]) -> bytes:
    """One line. Numbers that JSON has no name for become the texts ``"nan"``, ``"inf"`` and ``"-inf"``."""
    try:
        text = _encoder.encode(record)
    except (ValueError, TypeError):
        text = _encoder.encode(plain(record))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def encode_row(time_s: float, x: int, at: int, of: str, values: Mapping[str, float]) -> bytes:
    """The line of a ``metrics`` record. The same as ``encode`` makes, which takes a third longer for 20 numbers."""
    numbers = values.values()
    if type(x) is not int or not _NUMBERS.issuperset(map(type, numbers)) or not _are_finite(numbers):
        return encode({"kind": "metrics", "t": time_s, "x": x, "at": at, "of": of, "values": values})
    shape = (of, *values)
    line = _rows.get(shape)
    if line is None:
        if len(_rows) >= _SHAPES:
            _rows.clear()
        names = ",".join(f"{_text(name)}:%r" for name in values)
        line = f'{{"kind":"metrics","t":%r,"x":%r,"at":%r,"of":{_text(of)},"values":{{{names}}}}}\n'
        _rows[shape] = line
    return (line % (time_s, x, at, *numbers)).encode("utf-8", "backslashreplace")


def _are_finite(numbers: Iterable[float]) -> bool:
    try:
        return math.isfinite(sum(numbers))  # one of a sum that is not may be: the slow way finds out
    except OverflowError:  # an int that is no float
        return False


def _text(name: str) -> str:
    return _encoder.encode(str(name)).replace("%", "%%")


def decode(line: bytes) -> Record | None:
    """The record in ``line``; None if there is none, as in a line that a killed process wrote half of."""
    try:
        found: object = json.loads(line)
    except ValueError:
        return None
    return cast("Record", found) if isinstance(found, dict) and "kind" in found else None


def plain(value: object) -> object:
    """``value`` as strict JSON can hold it: containers and scalars stay, anything else becomes its text."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _named(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in cast("list[object]", value)]
    if isinstance(value, (int, str)):
        return str(value) if isinstance(value, str) else int(value)
    item = getattr(value, "item", None)
    if callable(item):  # numpy's and torch's numbers
        try:
            found = cast("Callable[[], object]", item)()
        except (RuntimeError, ValueError, TypeError):  # more than one element
            found = None
        if isinstance(found, (bool, int, float)):
            return plain(found)
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a user's __str__ must not stop the run
        return f"<{type(value).__name__}>"


def number(value: object) -> float | None:
    """A metric's value as it was logged; None if it is none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value) if isinstance(value, str) else None


def _named(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
