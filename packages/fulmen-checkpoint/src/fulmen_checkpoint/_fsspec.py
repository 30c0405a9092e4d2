"""The part of fsspec that is used here, typed: fsspec itself ships no types."""

from __future__ import annotations

from contextlib import suppress
from typing import IO, TYPE_CHECKING, Protocol, cast

import fsspec.core  # type: ignore[import-untyped]
import fsspec.spec  # type: ignore[import-untyped]

from fulmen_protocols.errors import BackendNotFound, MissingPackage

if TYPE_CHECKING:
    import datetime
    from collections.abc import Callable, Mapping

__all__ = ["FileSystem", "abandon", "has_own_move", "protocols", "resolve"]

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}


class FileSystem(Protocol):
    """``fsspec.AbstractFileSystem``, as far as it is used."""

    protocol: str | tuple[str, ...]

    def open(self, path: str, mode: str) -> IO[bytes]: ...
    def exists(self, path: str) -> bool: ...
    def isfile(self, path: str) -> bool: ...
    def isdir(self, path: str) -> bool: ...
    def ls(self, path: str, detail: bool = True) -> list[str]: ...
    def find(self, path: str) -> list[str]: ...
    def modified(self, path: str) -> datetime.datetime | float: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
    def mv(self, path1: str, path2: str) -> None: ...
    def cp_file(self, path1: str, path2: str) -> None: ...
    def rm_file(self, path: str) -> None: ...
    def rm(self, path: str, recursive: bool = False) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def invalidate_cache(self, path: str | None = None) -> None: ...
    def unstrip_protocol(self, name: str) -> str: ...


class _Upload(Protocol):
    closed: bool

    def discard(self) -> None: ...


def resolve(url: str, options: Mapping[str, object]) -> tuple[FileSystem, str]:
    """The file system that ``url`` names, and the path within it.

    Raises:
        MissingPackage: the package that speaks its protocol is not installed.
        BackendNotFound: fsspec knows no such protocol.
    """
    protocol = url.split("://", 1)[0]
    url_to_fs = cast("Callable[..., tuple[FileSystem, str]]", fsspec.core.url_to_fs)
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        run = f" Run: pip install {package}" if package else ""
        raise MissingPackage(f"{url!r} cannot be reached: {error}.{run}") from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise BackendNotFound(
            f"{url!r} cannot be reached: fsspec knows no file system {protocol!r}. "
            "Use a local path, or a URL of a file system whose fsspec package is installed."
        ) from error


def protocols(fs: FileSystem) -> frozenset[str]:
    """The names that ``fs`` goes by in URLs."""
    return frozenset({fs.protocol} if isinstance(fs.protocol, str) else fs.protocol)


def has_own_move(fs: FileSystem) -> bool:
    """Whether ``fs.mv`` is more than fsspec's copy and delete."""
    return getattr(type(fs), "mv", None) is not fsspec.spec.AbstractFileSystem.mv


def abandon(stream: IO[bytes]) -> None:
    """Drop an upload. Closing it, which its own ``__exit__`` and ``__del__`` do, would publish what it got so far."""
    if isinstance(stream, fsspec.spec.AbstractBufferedFile):
        upload = cast("_Upload", stream)
        with suppress(Exception):  # the connection may be what failed
            upload.discard()
        upload.closed = True
