"""TorchScript: torch's older format, deprecated upstream, for programs that still load it."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from fulmen_export._capture import quiet
from fulmen_export._compare import agree
from fulmen_export._destination import Target, staged
from fulmen_export._eager import Eager
from fulmen_export._inputs import Inputs, tensors_in
from fulmen_export._optional import only_options_of
from fulmen_export._refusal import unexportable
from fulmen_export._shapes import Shapes
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.jit import ScriptModule

__all__ = ["TorchScriptExporter"]

_WHAT = "exporter 'torchscript'"
_NOTICE = "PyTorch has deprecated TorchScript. Its successor is torch.export: exporter 'torch_export'."
_ADVICE = {
    "script": "TorchScript compiles a part of Python: rewrite that line, or give method='trace' and a sample.",
    "trace": "Tracing runs forward once: it must return tensors, or with strict=False dicts and lists of them.",
}


class TorchScriptExporter:
    """Writes what ``torch.jit.save`` writes. Load it with ``torch.jit.load(path)``."""

    def export(
        self,
        module: nn.Module,
        args: tuple[object, ...] | None = None,
        path: Target = None,
        *,
        kwargs: Mapping[str, object] | None = None,
        dynamic_shapes: object = None,
        method: Literal["script", "trace"] = "script",
        verify: bool = True,
        tolerance: float = 1e-5,
        **options: Any,
    ) -> ScriptModule:
        """See ``fulmen_protocols.Exporter.export``.

        Options of its own:
            dynamic_shapes: TorchScript knows no shapes; these only say on which other sizes to compare.
            method: ``"script"`` compiles the source of ``forward``, ``"trace"`` records one run of it.
            verify: whether to load the file and to compare it with the module before it is written. Without a sample,
                which ``"script"`` does not need, there is nothing to compare on.
            tolerance: largest difference, relative to the largest magnitude in an output, or to 1 if that is smaller.
            options: of ``torch.jit.script`` or ``torch.jit.trace``.
        """
        if method not in ("script", "trace"):
            raise MisconfigurationException(f"{_WHAT} got method={method!r}. It is 'script' or 'trace'.")
        warnings.warn(_NOTICE, DeprecationWarning, stacklevel=_callers_level())
        without = ("obj", "_frames_up", "_rcb", "func", "example_inputs", "example_kwarg_inputs")
        function = cast("Callable[..., object]", torch.jit.script if method == "script" else torch.jit.trace)
        only_options_of(function, options, f"{_WHAT} with method={method!r}", without=without)
        nothing = args is None and kwargs is None
        inputs = None if nothing and method == "script" else Inputs.of(_WHAT, module, args, kwargs)
        shapes = None if inputs is None else Shapes(_WHAT, inputs, dynamic_shapes)
        with staged(_WHAT, path, "model.pt") as file, Eager(_WHAT, module) as eager, quiet():
            if inputs is not None:
                eager.outputs(inputs)  # an error of forward's own comes as it is
            try:
                made = _scripted(module, options) if method == "script" else _traced(module, inputs, options)
                torch.jit.save(made, str(file))
            # The compiler raises several families of exceptions, the tracer passes on those of forward.
            except Exception as error:
                raise unexportable(_WHAT, module, error, _ADVICE[method]) from error
            if verify and inputs is not None and shapes is not None:
                loaded = cast("Any", torch.jit.load(str(file)))  # type: ignore[no-untyped-call]
                samples = [inputs, shapes.grown(inputs)]
                agree(_WHAT, eager, lambda own: tensors_in(loaded(*own.args, **own.kwargs)), samples, tolerance)
        return made


def _scripted(module: nn.Module, options: Mapping[str, object]) -> ScriptModule:
    return cast("ScriptModule", cast("Any", torch.jit.script)(module, **options))


def _traced(module: nn.Module, inputs: Inputs | None, options: Mapping[str, object]) -> ScriptModule:
    assert inputs is not None  # without a sample Inputs.of has refused
    sample = inputs.copied()
    how: dict[str, object]
    if sample.kwargs and not sample.args:
        how = {"example_kwarg_inputs": dict(sample.kwargs)}
    else:  # the tracer takes the one or the other
        how = {"example_inputs": tuple(sample.named().values()) if sample.kwargs else sample.args}
    return cast("ScriptModule", cast("Any", torch.jit.trace)(module, **how, **options))


def _callers_level() -> int:
    """The ``stacklevel`` of the first frame outside of fulmen's packages: the line that people can change."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("fulmen"):
        level, frame = level + 1, frame.f_back
    return level
