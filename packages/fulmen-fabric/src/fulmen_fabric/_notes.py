"""What assembling a run has found out so far: parts and where they come from, choices, conflicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from fulmen_fabric._conflicts import Conflicts
from fulmen_protocols import check, load
from fulmen_protocols.discovery import entry_points

if TYPE_CHECKING:
    from fulmen_protocols import Seam

__all__ = ["Notes", "shown", "source_of"]

T = TypeVar("T")


@dataclass(slots=True)
class Notes:
    """What assembling has found out so far."""

    conflicts: Conflicts = field(default_factory=Conflicts)
    chosen: list[str] = field(default_factory=list[str])
    sources: dict[str, str] = field(default_factory=dict[str, str])

    def load(self, seam: Seam[T], name: str, **options: object) -> T | None:
        """The backend of that name, or None after noting why there is none."""
        backend = self.conflicts.attempt(lambda: load(seam, name, **options))
        if backend is not None:
            self.sources[seam.noun] = source_of(seam, name)
        return backend

    def take(self, seam: Seam[T], backend: object) -> T | None:
        """The user's own object, or None after noting what it lacks."""
        if isinstance(backend, type):
            self.conflicts.add(
                f"{seam.noun}: got the class {backend.__name__}, not an instance. Write {backend.__name__}(...)."
            )
            return None
        checked = self.conflicts.attempt(lambda: check(seam, backend))
        if checked is not None:
            self.sources[seam.noun] = f"an instance of {type(backend).__name__}"
        return checked


def shown(asked: object) -> str:
    """An argument as messages show it: names and numbers as they are, of objects the class."""
    return repr(asked) if isinstance(asked, (str, int, float)) else type(asked).__name__


def source_of(seam: Seam[T], name: str) -> str:
    """Which distribution, in which version, a backend comes from."""
    point = entry_points(seam.group)[name]
    return f"{name} from {point.dist.name} {point.dist.version}" if point.dist is not None else name
