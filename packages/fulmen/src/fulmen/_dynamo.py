"""Keeping our own bookkeeping out of graphs that ``torch.compile`` captures, without importing ``torch._dynamo``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["never_compiled", "never_compiled_alone"]

F = TypeVar("F", bound=Callable[..., Any])


def never_compiled(function: F) -> F:
    """Mark ``function`` as ``torch.compiler.disable`` does, which costs 1 s of import and a wrapper's call.

    A compiled caller breaks its graph at the call, and the function with all it calls runs as plain Python. The marks
    are read by ``torch._dynamo``; where a version of torch does not know them the function is merely compiled.
    """
    marked = cast("Any", function)
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "fulmen keeps its bookkeeping outside of graphs"
    return never_compiled_alone(function)


def never_compiled_alone(function: F) -> F:
    """Let ``function`` be part of its caller's graph, but never the beginning of one.

    After a graph break somewhere else dynamo would compile the function's own frame, again for each of its arguments.
    """
    frames = cast("Any", getattr(getattr(cast("Any", torch)._C, "_dynamo", None), "eval_frame", None))
    if hasattr(frames, "set_code_exec_strategy") and hasattr(frames, "_FrameExecStrategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(cast("Any", function).__code__, frames._FrameExecStrategy(skip, skip))
    return function
