"""``fulmen checkpoint verify|list|show``: look at checkpoints from a shell.

``fulmen --help`` imports this module, so that what imports torch is imported by the function that needs it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, cast

from fulmen_protocols.errors import CheckpointError, FulmenError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Verify, list or show checkpoints at a path or URL.

    ``argv`` are the words after the command; None takes those of this process.

    Returns:
        0 when all is well, 1 when a checkpoint is damaged, missing or unreadable, 2 when the command is wrong.
    """
    parser = argparse.ArgumentParser("fulmen checkpoint", description="Look at checkpoints: paths or fsspec URLs.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verify = verbs.add_parser("verify", help="check every byte of checkpoints")
    verify.add_argument("path", nargs="+")
    listing = verbs.add_parser("list", help="list a folder's checkpoints, newest first, and whether each is whole")
    listing.add_argument("path", nargs="?", default=".")
    listing.add_argument("--pattern", default="*.ckpt", help="names to list (default: %(default)s)")
    show = verbs.add_parser("show", help="print what a checkpoint holds, without running code from it")
    show.add_argument("path")
    show.add_argument("--depth", type=int, default=3, help="levels of nesting to print (default: %(default)s)")
    try:
        asked = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    try:
        if asked.verb == "verify":
            return _verify(cast("list[str]", asked.path))
        if asked.verb == "list":
            return _list(cast("str", asked.path), cast("str", asked.pattern))
        return _show(cast("str", asked.path), cast("int", asked.depth))
    except (FulmenError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _verify(paths: list[str]) -> int:
    from fulmen_checkpoint.torch_io import TorchCheckpointIO

    io = TorchCheckpointIO()
    failed = 0
    for path in paths:
        try:
            io.verify_checkpoint(path)
        except CheckpointError as error:
            failed = 1
            print(error, file=sys.stderr)
        else:
            print(f"{path}: whole" + ("" if io.has_digest(path) else " (no digest: its records were checked)"))
    return failed


def _list(folder: str, pattern: str) -> int:
    from fulmen_checkpoint.find import list_checkpoints
    from fulmen_checkpoint.storage import FsspecStorage
    from fulmen_checkpoint.torch_io import TorchCheckpointIO

    storage = FsspecStorage()
    if not storage.exists(folder):
        print(f"there is no folder {folder!r}. Check the path.", file=sys.stderr)
        return 1
    io = TorchCheckpointIO(storage)
    damaged = 0
    for path in list_checkpoints(folder, pattern, storage):
        try:
            io.verify_checkpoint(path)
            state = "whole"
        except CheckpointError as error:
            damaged = 1
            state = str(error)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(storage.modified(path)))
        print(f"{when}  {path}  {state}")
    return damaged


def _show(path: str, depth: int) -> int:
    from fulmen_checkpoint.torch_io import TorchCheckpointIO

    # On the meta device: names, shapes and dtypes, but no values are read.
    checkpoint = TorchCheckpointIO().load_checkpoint(path, map_location="meta")
    for line in _tree(cast("dict[object, object]", checkpoint), 0, max(1, depth)):
        print(line)
    return 0


def _tree(value: Mapping[object, object], level: int, depth: int) -> Iterator[str]:
    for key, item in value.items():
        yield f"{'  ' * level}{key}: {_summary(item)}"
        if isinstance(item, dict) and level + 1 < depth:
            yield from _tree(cast("dict[object, object]", item), level + 1, depth)


def _summary(value: object) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return f"dict of {len(cast('dict[object, object]', value))}"
    if isinstance(value, (list, tuple, set)):
        items = cast("list[object]", value)
        return f"{_kind(items)} of {len(items)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: object) -> str:
    return type(value).__name__
