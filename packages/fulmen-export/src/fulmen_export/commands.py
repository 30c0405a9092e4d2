"""``fulmen export``: an artifact from a checkpoint, from a shell."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from fulmen_protocols import CHECKPOINT_IOS, EXPORTERS, available, load
from fulmen_protocols.errors import FulmenError, MisconfigurationException, did_you_mean

if TYPE_CHECKING:  # the command line's help need not import torch
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

__all__ = ["main"]

_EXAMPLE = "fulmen export last.ckpt --module train:Net --format onnx --input-shape 1,3,32,32 --output net.onnx"


def main(argv: Sequence[str] | None = None) -> int:
    """Export the model in a checkpoint: ONNX, torch.export, AOTInductor, TorchScript.

    ``argv`` are the words after the command; None takes those of this process.

    Returns:
        0 when the artifact was written, 1 when it could not be, 2 when the command is wrong.
    """
    parser = argparse.ArgumentParser(
        "fulmen export",
        description="Export the model in a checkpoint. The artifact is compared with the model before it is written.",
        epilog=f"Example: {_EXAMPLE}",
    )
    add = parser.add_argument
    add("checkpoint", help="path or URL of the checkpoint")
    add(
        "--module", required=True, metavar="PKG.MOD:CLASS", help="the model's class; the working folder is searched too"
    )
    add("--format", required=True, help=f"an installed exporter: {', '.join(available(EXPORTERS))}")
    add("--output", required=True, help="path or URL of the artifact")
    add(
        "--input-shape",
        nargs="+",
        metavar="N,N,...[:DTYPE]",
        help="shape of each positional input of forward, as 1,3,32,32 or 1,16:int64; "
        "left out, the model's example_input_array is used",
    )
    add("--dynamic-batch", action="store_true", help="let the first dimension of every input have any size")
    add(
        "--init", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the class that the file does not hold"
    )
    add("--option", nargs="+", default=[], metavar="NAME=VALUE", help="options of the exporter, as opset_version=18")
    add("--no-verify", action="store_true", help="do not run the artifact and compare it with the model")
    try:
        asked = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    try:
        _export(asked)
    except (FulmenError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _export(asked: argparse.Namespace) -> None:
    exporter = load(EXPORTERS, asked.format)
    options = _pairs("--option", asked.option)
    if asked.dynamic_batch:
        options["dynamic_shapes"] = "batch"
    if asked.no_verify:
        options["verify"] = False
    shapes = [_shape(text) for text in cast("list[str] | None", asked.input_shape) or []]
    module = _load(_class_of(asked.module), asked.checkpoint, _pairs("--init", asked.init)).eval()
    args, kwargs = _sample(module, shapes, asked.module)
    exporter.export(module, args, asked.output, kwargs=kwargs, **options)
    checked = "not compared with the model" if asked.no_verify else "equal to the model"
    print(f"{asked.output}: {asked.module} of {asked.checkpoint} as {asked.format}, {checked}")


def _class_of(name: str) -> type[nn.Module]:
    from torch import nn

    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise MisconfigurationException(f"--module is {name!r}. Write it as package.module:Class.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script, unlike python -m, does not search where it was started
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise MisconfigurationException(
            f"--module is {name!r}, and {module_name!r} cannot be imported: {error}. "
            f"Start the command in the folder that it is in ({os.getcwd()!r} was searched), or install it."
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise MisconfigurationException(
            f"--module is {name!r}, and {class_name!r} in {module_name!r} is {found!r}, not a class of modules."
            f"{did_you_mean(class_name, [key for key, value in vars(module).items() if isinstance(value, type)])}"
        )
    return found


def _load(cls: type[nn.Module], checkpoint: str, init: Mapping[str, object]) -> nn.Module:
    try:
        # What a LightningModule offers; a plain module is built, and takes the weights.
        own: Any = getattr(cls, "load_from_checkpoint", None)
        if own is not None:
            return cast("nn.Module", own(checkpoint, map_location="cpu", **init))
        content = load(CHECKPOINT_IOS, "torch").load_checkpoint(checkpoint, map_location="cpu")
        module = cls(**init)
        module.load_state_dict(cast("Mapping[str, Any]", content.get("state_dict", content)))
    except FulmenError:
        raise
    except (TypeError, RuntimeError) as error:
        raise MisconfigurationException(
            f"{cls.__name__} cannot be built from {checkpoint!r}: {error}. "
            "Give the arguments that the checkpoint does not hold as --init NAME=VALUE."
        ) from error
    return module


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise MisconfigurationException(f"{flag} got {text!r}. Write it as NAME=VALUE.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value  # a word
    return found


def _shape(text: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    import torch

    sizes, _, kind = text.partition(":")
    dtype = getattr(torch, kind, None) if kind else None
    try:
        shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    except ValueError:
        shape = (-1,)
    if any(size < 1 for size in shape) or (kind and not isinstance(dtype, torch.dtype)):
        raise MisconfigurationException(
            f"--input-shape got {text!r}. Write sizes of at least 1, as 1,3,32,32, and for other types than the "
            "model's own one of torch's dtypes: 1,16:int64."
        )
    return shape, dtype


def _sample(
    module: nn.Module, shapes: Sequence[tuple[tuple[int, ...], torch.dtype | None]], name: str
) -> tuple[tuple[object, ...] | None, Mapping[str, object] | None]:
    import torch

    if shapes:
        own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
        return tuple(_values(shape, dtype or own) for shape, dtype in shapes), None
    example: Any = getattr(module, "example_input_array", None)
    if example is None:
        raise MisconfigurationException(
            f"no --input-shape was given, and {name} has no example_input_array. "
            "Give the shape of each input of forward: --input-shape 1,3,32,32"
        )
    if isinstance(example, dict):
        return None, cast("dict[str, object]", example)
    return cast("tuple[object, ...]", example) if isinstance(example, tuple) else (example,), None


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)  # an index that every table has
