"""Files by path or URL: local ones through ``os``, others through fsspec, which is imported when a URL needs it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from os import PathLike
    from typing import TextIO

__all__ = [
    "absolute",
    "exists",
    "is_inside",
    "is_local",
    "join",
    "link",
    "list_folder",
    "make_folder",
    "modified",
    "open_text",
    "parent",
    "real",
    "write_bytes",
]


def is_local(path: str | PathLike[str]) -> bool:
    """Whether ``path`` lies in this machine's own file system."""
    return "://" not in str(path) or str(path).startswith("file://")


def absolute(path: str | PathLike[str]) -> str:
    """A local path made absolute, with ``~`` and ``file://`` resolved; a URL without trailing slash."""
    text = os.fspath(path)
    if not is_local(text):
        return text.rstrip("/")
    return os.path.abspath(os.path.expanduser(text.removeprefix("file://")))


def join(folder: str, *parts: str) -> str:
    """``folder`` and ``parts`` as one path; URLs keep their slashes on every platform."""
    return os.path.join(folder, *parts) if is_local(folder) else "/".join([folder.rstrip("/"), *parts])


def parent(path: str) -> str:
    """The folder that holds ``path``."""
    return os.path.dirname(path) if is_local(path) else path.rpartition("/")[0]


def real(path: str) -> str:
    """A local path with its symbolic links resolved; a URL as it is."""
    return os.path.realpath(path) if is_local(path) else path


def is_inside(path: str, folder: str) -> bool:
    """Whether ``path`` lies below ``folder``."""
    if not is_local(path):
        return path.startswith(folder.rstrip("/") + "/")
    inner, outer = os.path.abspath(path), os.path.abspath(folder)
    return inner != outer and os.path.commonpath([inner, outer]) == outer


def exists(path: str) -> bool:
    """Whether a file or a folder is there, a broken link included."""
    return os.path.lexists(path) if is_local(path) else bool(_remote(path).exists(path))


def list_folder(path: str) -> list[str]:
    """Names in a folder; empty when there is none."""
    if is_local(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    remote = _remote(path)
    if not remote.exists(path):
        return []
    return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in remote.ls(path, detail=False))


def modified(path: str) -> float:
    """Seconds since the epoch when a file was last written; 0 where the storage does not know."""
    if is_local(path):
        return os.stat(path).st_mtime
    info: dict[str, Any] = _remote(path).info(path)
    written: Any = info.get("mtime") or info.get("LastModified") or info.get("created") or 0
    return float(written.timestamp() if hasattr(written, "timestamp") else written)


def make_folder(path: str) -> None:
    """Make a folder and those above it. Having one already is allowed."""
    if is_local(path):
        os.makedirs(path, exist_ok=True)
    else:
        _remote(path).makedirs(path, exist_ok=True)


def link(target: str, path: str) -> None:
    """Make ``path`` a relative symbolic link to ``target``, or a copy where there are none; replaces what is there."""
    staged = f"{path}.link"
    _delete(staged)
    try:
        os.symlink(os.path.relpath(target, os.path.dirname(path)), staged)
    except OSError:  # a file system without links
        if os.path.isdir(target):
            shutil.copytree(target, staged)
        else:
            shutil.copy2(target, staged)
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)  # a folder cannot be replaced in one step
    os.replace(staged, path)


def _delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def open_text(path: str | PathLike[str], mode: str = "r") -> AbstractContextManager[TextIO]:
    """A text stream; lines keep their own endings."""
    if is_local(path):
        return cast("TextIO", open(absolute(path), mode, newline="", encoding="utf-8"))
    return cast(
        "AbstractContextManager[TextIO]", _remote(str(path)).open(str(path), mode, newline="", encoding="utf-8")
    )


def write_bytes(path: str, data: bytes) -> None:
    """Make or replace a file; its folder is there."""
    if is_local(path):
        with open(absolute(path), "wb") as file:
            file.write(data)
    else:
        _remote(path).pipe_file(path, data)


def _remote(url: str) -> Any:
    import fsspec  # type: ignore[import-untyped]  # it has no types

    return cast("Any", fsspec).core.url_to_fs(url)[0]
