"""``fulmen checkpoint verify|list|show|convert|consolidate|upgrade``: checkpoints from a shell.

``fulmen --help`` imports this module, so that what imports torch is imported by the function that needs it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, cast

from fulmen_checkpoint.names import FORMATS
from fulmen_protocols.errors import CheckpointError, FulmenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["consolidate", "main"]

_EVERYWHERE = "Paths are local or fsspec URLs (s3://bucket/run). No code from a checkpoint is run."


def main(argv: Sequence[str] | None = None) -> int:
    """Verify, list, show, convert, consolidate or upgrade checkpoints at a path or URL.

    ``argv`` are the words after the command; None takes those of this process.

    Returns:
        0 when all is well, 1 when a checkpoint is damaged, missing or unreadable, 2 when the command is wrong.
    """
    try:
        asked = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    run = cast("Callable[[argparse.Namespace], int]", asked.run)
    try:
        return run(asked)
    except (FulmenError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def consolidate(argv: Sequence[str] | None = None) -> int:
    """Make one torch file of a folder of shards; short for ``fulmen checkpoint consolidate``.

    ``argv`` and what is returned are as for ``main``.
    """
    return main(["consolidate", *(sys.argv[1:] if argv is None else argv)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fulmen checkpoint", description="Look at checkpoints and change their format.", epilog=_EVERYWHERE
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EVERYWHERE)
        made.set_defaults(run=run)
        return made

    verify = verb("verify", _verify, "check every byte of checkpoints")
    verify.add_argument("path", nargs="+", help="files or folders of shards")
    listing = verb("list", _list, "list a folder's checkpoints, newest first, and whether each is whole")
    listing.add_argument("path", nargs="?", default=".", help="the folder (default: this one)")
    listing.add_argument("--pattern", default="*.ckpt", help="names to list (default: %(default)s)")
    show = verb("show", _show, "print what a checkpoint holds: keys, shapes, dtypes and plain values")
    show.add_argument("path", help="a file or a folder of shards")
    show.add_argument("--depth", type=int, default=3, help="levels of nesting to print (default: %(default)s)")
    conversion = verb("convert", _convert, "write a checkpoint anew in another format")
    conversion.add_argument("path", help="a torch, Lightning or safetensors file, or a folder of shards")
    conversion.add_argument("target", help="where the new one goes")
    conversion.add_argument(
        "--to", choices=FORMATS, help="the new format (default: safetensors for a name that ends so, else torch)"
    )
    conversion.add_argument("--weights-only", action="store_true", help="keep the model's weights, drop the rest")
    conversion.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    joining = verb("consolidate", _consolidate, "make one torch file of a folder of shards")
    joining.add_argument("path", help="a folder of fulmen's, of torch.distributed.checkpoint or of Lightning's FSDP")
    joining.add_argument(
        "-o", "--output", "--output_file", help="the new file, which must not be there yet (default: PATH.consolidated)"
    )
    upgrading = verb("upgrade", _upgrade, "bring files of old Lightning versions to today's layout, keeping a .bak")
    upgrading.add_argument("path", help="a file, or a folder that is searched with all it holds")
    upgrading.add_argument("-e", "--extension", default=".ckpt", help="of files in folders (default: %(default)s)")
    return parser


def _verify(asked: argparse.Namespace) -> int:
    from fulmen_checkpoint.torch_io import TorchCheckpointIO

    io = TorchCheckpointIO()
    failed = 0
    for path in cast("list[str]", asked.path):
        try:
            io.verify_checkpoint(path)
        except CheckpointError as error:
            failed = 1
            print(error, file=sys.stderr)
        else:
            print(f"{path}: whole" + ("" if io.has_digest(path) else " (no digest: its records were checked)"))
    return failed


def _list(asked: argparse.Namespace) -> int:
    from fulmen_checkpoint.find import list_checkpoints
    from fulmen_checkpoint.storage import FsspecStorage
    from fulmen_checkpoint.torch_io import TorchCheckpointIO

    folder = cast("str", asked.path)
    storage = FsspecStorage()
    if not storage.exists(folder):
        print(f"there is no folder {folder!r}. Check the path.", file=sys.stderr)
        return 1
    io = TorchCheckpointIO(storage)
    damaged = 0
    for path in list_checkpoints(folder, cast("str", asked.pattern), storage):
        try:
            io.verify_checkpoint(path)
            state = "whole"
        except CheckpointError as error:
            damaged = 1
            state = str(error)
        try:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(storage.modified(path)))
        except (FileNotFoundError, IsADirectoryError):  # a folder of an object store has no date
            when = " " * 19
        print(f"{when}  {path}  {state}")
    return damaged


def _show(asked: argparse.Namespace) -> int:
    from fulmen_checkpoint.torch_io import TorchCheckpointIO

    # On the meta device: names, shapes and dtypes, but no values are read.
    checkpoint = TorchCheckpointIO().load_checkpoint(cast("str", asked.path), map_location="meta")
    for line in _tree(cast("dict[object, object]", checkpoint), 0, max(1, cast("int", asked.depth))):
        print(line)
    return 0


def _convert(asked: argparse.Namespace) -> int:
    from fulmen_checkpoint.conversion import convert

    convert(asked.path, asked.target, asked.to, only_weights=asked.weights_only, overwrite=asked.overwrite)
    print(f"wrote {asked.target}")
    return 0


def _consolidate(asked: argparse.Namespace) -> int:
    from fulmen_checkpoint import conversion

    print(f"wrote {conversion.consolidate(asked.path, asked.output)}")
    return 0


def _upgrade(asked: argparse.Namespace) -> int:
    from fulmen_checkpoint.upgrading import upgrade

    path, extension = cast("str", asked.path), cast("str", asked.extension)
    found = upgrade(path, extension if extension.startswith(".") else f".{extension}")
    if not found:
        print(f"no file that ends in {extension!r} is in {path!r}. Name another with --extension.", file=sys.stderr)
        return 1
    for file, applied in found:
        print(f"{file}: {'changes of ' + ', '.join(applied) if applied else 'is of today'}")
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
