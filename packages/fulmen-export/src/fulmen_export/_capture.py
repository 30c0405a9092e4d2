"""Capturing a module as one graph with ``torch.export``, quietly and with an error that says where."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_export._optional import only_options_of
from fulmen_export._refusal import CAPTURE_ADVICE, unexportable

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from torch import nn
    from torch.export import ExportedProgram

    from fulmen_export._inputs import Inputs
    from fulmen_export._shapes import Shapes

__all__ = ["OURS", "capture", "quiet"]

OURS = ("mod", "args", "kwargs", "dynamic_shapes")
"""The parameters of ``torch.export.export`` that are set here."""


def capture(
    what: str, module: nn.Module, inputs: Inputs, shapes: Shapes, options: Mapping[str, object] | None = None
) -> ExportedProgram:
    """The graph of ``module`` for ``inputs``; ``options``: further ones of ``torch.export.export``.

    Raises:
        ExportError: it cannot be captured; says which line and which operation.
        MisconfigurationException: an option is none of it.
    """
    options = options or {}
    only_options_of(torch.export.export, options, what, without=OURS)
    sample = shapes.at_least_two(inputs).copied()
    keywords = cast("dict[str, Any]", {"dynamic_shapes": shapes.for_capture(), **options})
    try:
        with quiet():
            return torch.export.export(module, sample.args, dict(sample.kwargs), **keywords)
    # torch raises several families of exceptions here, and passes on whatever forward raises under tracing.
    except Exception as error:
        advice = CAPTURE_ADVICE
        if shapes.by_name is not None and "Constraints violated" in str(error):
            advice = f"dynamic_shapes={shapes.by_name!r} asks for sizes that forward fixes: {_details(error)}"
        raise unexportable(what, module, error, advice) from error


@contextmanager
def quiet() -> Generator[None]:
    """Without torch's warnings about its own internals."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


def _details(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("- ")]
    return " ".join(lines)[:400] or "leave that dimension out."
