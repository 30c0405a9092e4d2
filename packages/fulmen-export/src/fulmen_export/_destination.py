"""Where an artifact goes: staged in a temporary folder, and at its place in one step once it was checked."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Protocol, cast

import fsspec.core  # type: ignore[import-untyped]

from fulmen_protocols.errors import BackendNotFound, MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

__all__ = ["Target", "staged"]

Target = str | os.PathLike[str] | IO[bytes] | None

# In these an object appears when its upload is completed and not before.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "tos", "obs"})
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


class _FileSystem(Protocol):
    protocol: str | tuple[str, ...]

    def isdir(self, path: str) -> bool: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
    def put_file(self, lpath: str, rpath: str) -> None: ...
    def mv(self, path1: str, path2: str) -> None: ...
    def rm_file(self, path: str) -> None: ...


@contextmanager
def staged(what: str, path: Target, name: str) -> Generator[Path]:
    """A file to be written within the block; it, and what lies beside it, goes to ``path`` when the block ends well.

    Args:
        what: the exporter, for messages.
        path: a path, a URL, a stream, or None for nowhere. That it can be written is checked before the block.
        name: of the file, where ``path`` gives none.

    Raises:
        MisconfigurationException: ``path`` is a folder, or cannot be written.
    """
    text = _text(path)
    remote = _resolve(text) if text is not None and _is_url(text) else None
    local = None if text is None or remote is not None else os.path.abspath(os.path.expanduser(_stripped(text)))
    if path is not None and text is None and not callable(getattr(path, "write", None)):
        raise MisconfigurationException(
            f"{what} got {path!r} as its path. Give a path, a URL or a binary stream, or None to write nothing."
        )
    if local is not None:
        _check_local(what, local)
    if remote is not None and remote[0].isdir(remote[1]):
        raise MisconfigurationException(f"{what} cannot write {text!r}: it is a folder. Give the name of a file.")
    with TemporaryDirectory(prefix="fulmen-export-") as folder:
        file = Path(folder) / (os.path.basename(local or (remote[1] if remote else "")) or name)
        yield file
        files = sorted(Path(folder).iterdir(), key=lambda entry: (entry == file, entry))  # the artifact itself last
        try:
            if remote is not None:
                _put(remote[0], remote[1].rpartition("/")[0], files)
            elif local is not None:
                _publish(os.path.dirname(local), files)
            elif path is not None:
                _pour(what, cast("IO[bytes]", path), files)
        except OSError as error:
            raise _unwritable(what, text or repr(path), f"{type(error).__name__}: {error}") from error


def _text(path: Target) -> str | None:
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else None


def _is_url(path: str) -> bool:
    return ("://" in path or "::" in path) and not path.startswith(("file://", "local://"))


def _stripped(path: str) -> str:
    return path.removeprefix("file://").removeprefix("local://")


def _check_local(what: str, path: str) -> None:
    if os.path.isdir(path):
        raise MisconfigurationException(f"{what} cannot write {path!r}: it is a folder. Give the name of a file.")
    folder = os.path.dirname(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise _unwritable(what, path, f"{folder!r} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(what, path, f"this process may not write in {folder!r}")


def _unwritable(what: str, path: str, found: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{what} cannot write {path!r}: {found}. Choose a place that this process may write, with space left."
    )


def _publish(folder: str, files: Sequence[Path]) -> None:
    os.makedirs(folder, exist_ok=True)
    staging = [os.path.join(folder, f".{file.name}.{os.getpid()}.partial") for file in files]
    try:
        for file, copy in zip(files, staging, strict=True):
            shutil.copyfile(file, copy)
            with open(copy, "rb+") as stream:
                os.fsync(stream.fileno())
        for file, copy in zip(files, staging, strict=True):
            os.replace(copy, os.path.join(folder, file.name))
    except BaseException:
        for copy in staging:
            with suppress(OSError):
                os.remove(copy)
        raise


def _put(fs: _FileSystem, folder: str, files: Sequence[Path]) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if folder and not protocols & _OBJECT_STORES:
        fs.makedirs(folder, exist_ok=True)
    for file in files:
        target = f"{folder}/{file.name}" if folder else file.name
        if protocols & _OBJECT_STORES:
            fs.put_file(str(file), target)
            continue
        staging = f"{folder}/.{file.name}.{os.getpid()}.partial" if folder else f".{file.name}.{os.getpid()}.partial"
        try:
            fs.put_file(str(file), staging)
            fs.mv(staging, target)
        except BaseException:
            with suppress(Exception):
                fs.rm_file(staging)
            raise


def _pour(what: str, stream: IO[bytes], files: Sequence[Path]) -> None:
    if len(files) > 1:
        raise MisconfigurationException(
            f"{what} made {len(files)} files ({', '.join(file.name for file in files)}), which one stream cannot hold. "
            "Give a path."
        )
    with open(files[0], "rb") as source:
        shutil.copyfileobj(source, stream)


def _resolve(url: str) -> tuple[_FileSystem, str]:
    protocol = url.split("://", 1)[0]
    url_to_fs = cast("Callable[..., tuple[_FileSystem, str]]", fsspec.core.url_to_fs)
    try:
        return url_to_fs(url)
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
