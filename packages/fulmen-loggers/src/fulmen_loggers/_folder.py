"""The folder of one run: ``SAVE_DIR/NAME/version_N``, chosen once and never taken from another run."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Protocol, cast

import fsspec.core  # type: ignore[import-untyped]

from fulmen_protocols.errors import BackendNotFound, MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RunFolder", "make_folder"]

# How launchers (torchrun and ours, SLURM, Open MPI, MPICH, LSF) tell a process which of a run it is.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")
_VERSION = re.compile(r"version_(\d+)")


class _FileSystem(Protocol):
    """``fsspec.AbstractFileSystem``, as far as it is used: fsspec ships no types."""

    def ls(self, path: str, detail: bool = True) -> list[str]: ...
    def exists(self, path: str) -> bool: ...
    def cat_file(self, path: str) -> bytes: ...
    def pipe_file(self, path: str, value: bytes) -> None: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
    def invalidate_cache(self, path: str | None = None) -> None: ...


class RunFolder:
    """Where one run writes: a local folder or an fsspec URL. Nothing is touched before ``version`` is first read.

    Args:
        logger: class name of the logger, for messages.
        save_dir: the root folder that the user chose.
        name: folder below it; empty or None for none.
        version: a number (folder ``version_N``), a text used as it is, or None for the next free number.
    """

    def __init__(
        self, logger: str, save_dir: str | os.PathLike[str], name: str | None, version: int | str | None
    ) -> None:
        self.save_dir: str = os.path.expanduser(os.fspath(save_dir))
        self.name = name
        self._logger = logger
        self._version = version
        self._guessed = False

    @property
    def is_remote(self) -> bool:
        """Whether the folder is a URL and not a path of this machine."""
        return "://" in self.save_dir or "::" in self.save_dir

    @property
    def root(self) -> str:
        """The folder of all versions."""
        return self.join(self.save_dir, self.name) if self.name else self.save_dir

    @property
    def version(self) -> int | str:
        """Which run this is. First read without a version given: makes the next free folder, and so owns it.

        Only in the first process of a run: another one, reading it by chance, must not take a second folder. It gets a
        guess until it is told, or writes.
        """
        if self._version is None:
            self._guessed = not self.is_remote and _is_follower()
            self._version = self._next_local() if self._guessed else self._take()
        return self._version

    @version.setter
    def version(self, version: int | str) -> None:
        self._version, self._guessed = version, False

    def own(self) -> None:
        """Make sure that the version is this run's, before the first write."""
        if self._version is None or self._guessed:
            self._version, self._guessed = self._take(), False

    @property
    def path(self) -> str:
        """The folder of this run."""
        version = self.version
        return self.join(self.root, version if isinstance(version, str) else f"version_{version}")

    def join(self, folder: str, *parts: str) -> str:
        """Path or URL of something in ``folder``."""
        if self.is_remote:
            return "/".join([folder.rstrip("/"), *parts])
        return os.path.join(folder, *parts)

    def make(self, folder: str) -> None:
        """Make a folder and its parents.

        Raises:
            MisconfigurationException: this process may not.
        """
        try:
            if self.is_remote:
                fs, inner = self._resolve(folder)
                fs.makedirs(inner, exist_ok=True)
            else:
                os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise self.unwritable(folder, error) from error

    def read(self, path: str) -> bytes | None:
        """The bytes of a file; None when there is none."""
        try:
            if self.is_remote:
                fs, inner = self._resolve(path)
                fs.invalidate_cache(inner)
                return fs.cat_file(inner)
            with open(path, "rb") as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        """Replace a file in one step.

        Raises:
            MisconfigurationException: this process may not, or the storage failed.
        """
        try:
            if self.is_remote:
                fs, inner = self._resolve(path)
                fs.pipe_file(inner, data)
                return
            staging = f"{path}.{os.getpid()}.partial"
            with open(staging, "wb") as stream:
                stream.write(data)
            os.replace(staging, path)
        except OSError as error:
            raise self.unwritable(path, error) from error

    def unwritable(self, path: str, error: OSError) -> MisconfigurationException:
        """The error for a place that cannot be written."""
        return _unwritable(self._logger, "save_dir", self.save_dir, path, error)

    def _next_local(self) -> int:
        return _after(os.listdir(self.root)) if os.path.isdir(self.root) else 0

    def _take(self) -> int:
        if self.is_remote:  # an object store has no folders to own
            return self._next_remote()
        root = self.root
        self.make(root)
        number = self._next_local()
        while True:
            try:
                # The only operation that two runs starting together cannot both succeed at.
                os.mkdir(os.path.join(root, f"version_{number}"))
            except FileExistsError:
                number += 1
            except OSError as error:
                raise self.unwritable(root, error) from error
            else:
                return number

    def _next_remote(self) -> int:
        fs, inner = self._resolve(self.root)
        fs.invalidate_cache(inner)
        try:
            names = fs.ls(inner, detail=False)
        except FileNotFoundError:
            return 0
        return _after([name.rstrip("/").rsplit("/", 1)[-1] for name in names])

    def _resolve(self, url: str) -> tuple[_FileSystem, str]:
        url_to_fs = cast("Callable[..., tuple[_FileSystem, str]]", fsspec.core.url_to_fs)
        protocol = url.split("://", 1)[0]
        try:
            return url_to_fs(url)
        except ImportError as error:
            package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}.get(protocol)
            run = f" Run: pip install {package}" if package else ""
            raise MissingPackage(f"{url!r} cannot be reached: {error}.{run}") from error
        except ValueError as error:
            if "Protocol not known" not in str(error):
                raise
            raise BackendNotFound(
                f"{url!r} cannot be reached: fsspec knows no file system {protocol!r}. "
                "Use a local path, or a URL of a file system whose fsspec package is installed."
            ) from error


def make_folder(logger: str, flag: str, path: str) -> None:
    """Make a local folder that a service's library writes to.

    Args:
        logger: class name, for the message.
        flag: the argument that names the folder.
        path: of the folder.

    Raises:
        MisconfigurationException: this process may not.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise _unwritable(logger, flag, path, path, error) from error


def _unwritable(logger: str, flag: str, given: str, path: str, error: OSError) -> MisconfigurationException:
    return MisconfigurationException(
        f"{logger}({flag}={given!r}) cannot write {path!r}: {type(error).__name__}: {error}. "
        f"Choose {flag} so that this process may write there, with space left."
    )


def _after(names: list[str]) -> int:
    taken = [int(match[1]) for match in map(_VERSION.fullmatch, names) if match]
    return max(taken, default=-1) + 1


def _is_follower() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in _RANKS)
