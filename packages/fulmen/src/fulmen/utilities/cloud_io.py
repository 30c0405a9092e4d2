"""File systems by path or URL, where Lightning has them."""

from __future__ import annotations

from os import fspath
from typing import TYPE_CHECKING, Any, cast

import fsspec  # type: ignore[import-untyped]  # it has no types

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["get_filesystem"]


def get_filesystem(path: str | PathLike[str], **kwargs: Any) -> Any:
    """Fsspec's file system for ``path``; ``kwargs`` are its storage options."""
    return cast("Any", fsspec).core.url_to_fs(fspath(path), **kwargs)[0]
