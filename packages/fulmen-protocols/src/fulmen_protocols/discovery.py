"""Finding backends by name: entry points, read lazily, cached, checked against their protocol.

Ours register exactly as a vendor's do. Nothing falls back: a name is found, or an error says what is installed.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, TypeVar, cast

from fulmen_protocols.errors import BackendNotFound, BrokenPlugin, FulmenError, NotConforming, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint

    from fulmen_protocols.seams import Seam

__all__ = ["available", "check", "entry_points", "load", "load_factory", "missing_members"]

T = TypeVar("T")


@cache
def entry_points(group: str) -> Mapping[str, EntryPoint]:
    """The installed entry points of ``group`` by name. The first distribution on ``sys.path`` wins a name."""
    # importlib.metadata costs some 40 ms to import: only a process that looks a name up pays it.
    from importlib.metadata import entry_points as installed

    found: dict[str, EntryPoint] = {}
    for point in installed(group=group):
        found.setdefault(point.name, point)
    return found


def available(seam: Seam[T]) -> list[str]:
    """Names of the installed backends of ``seam``, sorted; nothing is imported."""
    return sorted(entry_points(seam.group))


def load_factory(seam: Seam[T], name: str) -> object:
    """Import what ``name`` is registered as: a class or a function that returns a backend.

    Raises:
        BackendNotFound: no installed distribution registers ``name``.
        BrokenPlugin: its module raised while it was imported.
    """
    points = entry_points(seam.group)
    point = points.get(name)
    if point is None:
        installed = ", ".join(sorted(points)) or "none"
        hint = did_you_mean(name, points)
        get = "" if points and hint else f" Ours come with: pip install {seam.home}"
        raise BackendNotFound(f"no {seam.noun} is named {name!r}.{hint} Installed: {installed}.{get}")
    try:
        return point.load()
    except FulmenError:
        raise  # a MissingPackage already says what to install
    except Exception as error:
        origin = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
        raise BrokenPlugin(
            f"{seam.noun} {name!r} of {origin} cannot be imported from {point.value!r}: "
            f"{type(error).__name__}: {error}. Update or uninstall that distribution."
        ) from error


def load(seam: Seam[T], name: str, **options: object) -> T:
    """Look ``name`` up, import it, call it with ``options``, check the result and return it.

    Raises:
        BackendNotFound, BrokenPlugin: see ``load_factory``.
        NotConforming: what it returned is not a backend of ``seam``.
    """
    factory = load_factory(seam, name)
    if not callable(factory):
        raise NotConforming(
            f"{seam.noun} {name!r} is registered as {factory!r}, which cannot be called. "
            "Register a class or a function that returns a backend."
        )
    return check(seam, factory(**options))


def check(seam: Seam[T], backend: object) -> T:
    """Return ``backend`` if it has every member of the seam's protocol.

    Raises:
        NotConforming: members are missing; the message lists them.
    """
    missing = missing_members(seam.protocol, backend)
    if missing:
        raise NotConforming(
            f"{type(backend).__name__} is not a {seam.protocol.__name__}: it lacks {', '.join(missing)}."
        )
    return cast("T", backend)


def missing_members(protocol: type, backend: object) -> list[str]:
    """Members of ``protocol`` that ``backend`` lacks, sorted. Looks without running properties: some raise before launch."""
    return sorted(name for name in _members(protocol) if not _has(backend, name))


@cache
def _members(protocol: type) -> frozenset[str]:
    names: set[str] = set()
    for base in protocol.__mro__:
        if getattr(base, "_is_protocol", False):
            names.update(base.__dict__, base.__dict__.get("__annotations__", {}))
    return frozenset(name for name in names if not name.startswith("_"))


def _has(backend: object, name: str) -> bool:
    # A backend may answer for members dynamically (a wrapper with __getattr__): then asking is the only way to know.
    if inspect.getattr_static(backend, name, None) is not None:
        return True
    return hasattr(type(backend), "__getattr__") and hasattr(backend, name)
