"""Finding backends by name: entry points, read lazily, cached, checked against their protocol.

Ours register exactly as a vendor's do. Nothing falls back: a name is found, or an error says what is installed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, TypeVar, cast

from fulmen_protocols.errors import BackendNotFound, BrokenPlugin, FulmenError, NotConforming, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint

    from fulmen_protocols.seams import Seam

__all__ = [
    "available",
    "check",
    "entry_points",
    "forget",
    "load",
    "load_factory",
    "missing_members",
    "origin",
    "other_versions",
    "registrations",
]

T = TypeVar("T")


@cache
def registrations(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Every installed entry point of ``group`` by name; several when distributions contend for one name.

    Read once per process; ``forget`` makes the next call read again. Order is that of ``sys.path``.
    """
    # importlib.metadata costs some 40 ms to import: only a process that looks a name up pays it.
    from importlib.metadata import entry_points as installed

    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in installed(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def entry_points(group: str) -> Mapping[str, EntryPoint]:
    """The entry point that ``group`` uses for each name: the first distribution on ``sys.path`` wins a name."""
    return {name: points[0] for name, points in registrations(group).items()}


def other_versions(group: str) -> list[EntryPoint]:
    """Entry points of older and newer versions of ``group`` (``fulmen.strategies.v2`` for ``...v1``); never used."""
    from importlib.metadata import distributions

    stem, _, _ = group.rpartition(".v")
    found: list[EntryPoint] = []
    seen: set[str] = set()
    for dist in distributions():
        if dist.name in seen:
            continue  # an older copy further down sys.path
        seen.add(dist.name)
        found += [point for point in dist.entry_points if point.group.startswith(f"{stem}.v") and point.group != group]
    return [point for point in found if _version_of(point.group) is not None]


def forget() -> None:
    """Read the installed distributions again at the next look-up, for one that was installed meanwhile."""
    from importlib import invalidate_caches

    registrations.cache_clear()
    invalidate_caches()


def origin(point: EntryPoint) -> str:
    """Distribution and version that registered ``point``, for messages: ``"acme-fulmen 0.3.0"``."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def available(seam: Seam[T]) -> list[str]:
    """Names of the installed backends of ``seam``, sorted; nothing is imported."""
    return sorted(registrations(seam.group))


def load_factory(seam: Seam[T], name: str) -> object:
    """Import what ``name`` is registered as: a class or a function that returns a backend.

    Raises:
        BackendNotFound: no installed distribution registers ``name``.
        BrokenPlugin: its module raised while it was imported.
        MissingPackage: its module needs an optional library that is not installed.
    """
    if name not in registrations(seam.group):
        forget()  # in a notebook, perhaps it was installed a moment ago
    points = entry_points(seam.group)
    point = points.get(name)
    if point is None:
        raise BackendNotFound(_not_found(seam, name, points))
    try:
        return point.load()
    except FulmenError:
        raise  # a MissingPackage already says what to install
    # A third party's module may raise anything, and call sys.exit too.
    except (Exception, SystemExit) as error:
        raise BrokenPlugin(
            f"{seam.noun} {name!r} of {origin(point)} cannot be imported from {point.value!r}: "
            f"{type(error).__name__}: {error}. Update or uninstall that distribution."
        ) from error


def load(seam: Seam[T], name: str, **options: object) -> T:
    """Look ``name`` up, import it, call it with ``options``, check the result and return it.

    Raises:
        BackendNotFound, BrokenPlugin, MissingPackage: see ``load_factory``.
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
        NotConforming: members are missing, or ``backend`` is a class where an instance is needed.
    """
    protocol = seam.protocol.__name__
    if isinstance(backend, type) and seam.protocol.__dict__.get("__call__") is None:
        raise NotConforming(
            f"{backend.__name__} is a class; as {seam.noun} pass an instance of it: {backend.__name__}()."
        )
    missing = missing_members(seam.protocol, backend)
    if missing:
        raise NotConforming(f"{type(backend).__name__} does not satisfy {protocol}: it lacks {', '.join(missing)}.")
    return cast("T", backend)


def missing_members(protocol: type, backend: object) -> list[str]:
    """Members of ``protocol`` that ``backend`` lacks, sorted.

    Looks without running properties: some raise before launch.
    """
    return sorted(name for name in _members(protocol) if not _has(backend, name))


def _not_found(seam: Seam[T], name: str, points: Mapping[str, EntryPoint]) -> str:
    installed = ", ".join(sorted(points)) or "none"
    hint = did_you_mean(name, points)
    has_ours = any(point.dist is not None and point.dist.name == seam.home for point in points.values())
    get = "" if has_ours or (points and hint) else f" Ours come with: pip install {seam.home}"
    others = [point for point in other_versions(seam.group) if point.name == name]
    versions = "".join(f" {_why_not_read(point, seam.group)}" for point in others)
    return f"no {seam.noun} is named {name!r}.{hint} Installed: {installed}.{versions}{get if not others else ''}"


def _why_not_read(point: EntryPoint, group: str) -> str:
    theirs, ours = _version_of(point.group) or 0, _version_of(group) or 0
    update = "fulmen-protocols" if theirs > ours else point.dist.name if point.dist is not None else "it"
    return f"{origin(point)} registers {point.name!r} in {point.group!r}, but {group!r} is read here: update {update}."


def _version_of(group: str) -> int | None:
    _, _, version = group.rpartition(".v")
    return int(version) if version.isdecimal() else None


@cache
def _members(protocol: type) -> frozenset[str]:
    names: set[str] = set()
    for base in protocol.__mro__:
        if getattr(base, "_is_protocol", False):
            # Annotations are read from the class itself: get_type_hints would evaluate them and import torch.
            annotations: dict[str, object] = getattr(base, "__annotations__", {})
            names.update(base.__dict__, annotations)
    return frozenset(name for name in names if not name.startswith("_"))


def _has(backend: object, name: str) -> bool:
    from inspect import getattr_static  # inspect costs 10 ms to import

    if getattr_static(backend, name, None) is not None:
        return True
    # A backend may answer for members dynamically (a wrapper with __getattr__): then asking is the only way to know.
    return hasattr(type(backend), "__getattr__") and hasattr(backend, name)
