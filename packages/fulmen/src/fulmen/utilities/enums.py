"""Enumerations whose members are strings."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from fulmen_protocols import did_you_mean

__all__ = ["GradClipAlgorithmType", "LightningEnum"]

_Source = Literal["key", "value", "any"]


class LightningEnum(StrEnum):
    """Members are equal to their value written in capitals or not, and are found by name or value."""

    @classmethod
    def from_str(cls, value: str, source: _Source = "key") -> Self:
        """The member of that name (``key``), that value, or either (``any``); capitals do not count.

        Raises:
            ValueError: there is none.
        """
        found = cls.try_from_str(value, source)
        if found is not None:
            return found
        known = [member.value if source == "value" else member.name for member in cls]
        raise ValueError(
            f"{cls.__name__} has no member {value!r}.{did_you_mean(value, known)} Allowed: {', '.join(known)}."
        )

    @classmethod
    def try_from_str(cls, value: str, source: _Source = "key") -> Self | None:
        """The same, or None where there is none."""
        asked = value.replace("-", "_").lower()
        for member in cls:
            if source in ("key", "any") and member.name.lower() == asked:
                return member
            if source in ("value", "any") and member.value.lower() == value.lower():
                return member
        return None

    def __eq__(self, other: object) -> bool:
        return self.value.lower() == other.lower() if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value.lower())


class GradClipAlgorithmType(LightningEnum):
    """What ``gradient_clip_algorithm`` may be: by the norm of all gradients together, or each value by itself."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Whether ``val`` is the value of a member."""
        return val in GradClipAlgorithmType.supported_types()

    @staticmethod
    def supported_types() -> list[str]:
        """The members' values."""
        return [member.value for member in GradClipAlgorithmType]
