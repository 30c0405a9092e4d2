"""What every kit has: a guard against tests that were switched off, and asking for abilities."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from fulmen_protocols import missing_members

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Kit", "need", "offers", "switched_off", "whole_or_absent"]

_GUARD = "test_nothing_is_switched_off"


class Kit:
    """Base of the kits. Subclasses outside this package supply fixtures and change no test."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not _is_kit(cls) and _GUARD in cls.__dict__:
            raise TypeError(f"{cls.__qualname__} replaces {_GUARD}, which proves that the kit is whole. Remove it.")

    def test_nothing_is_switched_off(self) -> None:
        """Every test of the kit runs as it was written, or is marked ``xfail`` with a reason.

        On failure look at the listed names in your subclass: delete them, or decorate the override with
        ``@pytest.mark.xfail(reason="...")`` so that everybody sees the gap.
        """
        problems = switched_off(type(self))
        assert not problems, "; ".join(problems)


def switched_off(cls: type) -> list[str]:
    """One sentence for each kit test of ``cls`` that does not run as written; empty when all do."""
    problems: list[str] = []
    for name, original in _kit_members(cls):
        found = inspect.getattr_static(cls, name, None)
        if found is None:
            problems.append(f"{name} was set to None")
        elif any(mark.name in ("skip", "skipif") for mark in _marks(found)):
            problems.append(f"{name} is skipped; mark it xfail with a reason instead")
        elif found is not original and not (name.startswith("test_") and _is_honest_xfail(found)):
            problems.append(f"{name} was replaced; mark it xfail with a reason instead")
    return problems


def _is_kit(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "fulmen_conformance"


def _kit_members(cls: type) -> Iterator[tuple[str, object]]:
    """Tests, and private fixtures on which they rest; the public fixtures are the vendor's to replace."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not _is_kit(base):
            continue
        for name, value in base.__dict__.items():
            if name.startswith(("test_", "kit_")) and name not in seen:
                seen.add(name)
                yield name, value


def _marks(function: object) -> list[pytest.Mark]:
    marks: list[pytest.Mark] = getattr(function, "pytestmark", [])
    return list(marks)


def _is_honest_xfail(function: object) -> bool:
    # A condition could be false, and then the replacement would count as the kit's test.
    return any(
        mark.name == "xfail" and not mark.args and "condition" not in mark.kwargs and bool(mark.kwargs.get("reason"))
        for mark in _marks(function)
    )


def offers(backend: object, ability: type) -> bool:
    """Whether ``backend`` has every member of ``ability``; no property is run."""
    return not missing_members(ability, backend)


def need(backend: object, ability: type) -> None:
    """Skip the running test, saying why, unless ``backend`` offers ``ability``."""
    if not offers(backend, ability):
        pytest.skip(f"{type(backend).__name__} does not offer {ability.__name__}")


def whole_or_absent(backend: object, abilities: tuple[type, ...]) -> list[str]:
    """One sentence for each ability of which ``backend`` has some members but not all."""
    problems: list[str] = []
    for ability in abilities:
        missing = missing_members(ability, backend)
        wanted = missing_members(ability, None)
        if missing and len(missing) < len(wanted):
            problems.append(f"{type(backend).__name__} has part of {ability.__name__}: it lacks {', '.join(missing)}")
    return problems
