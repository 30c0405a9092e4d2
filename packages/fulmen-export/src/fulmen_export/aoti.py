"""AOTInductor: a package of compiled code that runs from Python or C++ without the model's source."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any, cast

from fulmen_export._capture import capture, quiet
from fulmen_export._compare import agree
from fulmen_export._destination import Target, staged
from fulmen_export._eager import Eager
from fulmen_export._inputs import Inputs, tensors_in
from fulmen_export._refusal import unexportable
from fulmen_export._shapes import Shapes, other_sizes
from fulmen_protocols.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

__all__ = ["AOTInductorExporter"]

_WHAT = "exporter 'aoti'"
_ADVICE = "Export it with 'torch_export', or compile it with torch.compile to see the compiler's own report."


class AOTInductorExporter:
    """Writes what ``torch._inductor.aoti_compile_and_package`` does, for the device that the module is on.

    Load it with ``torch._inductor.aoti_load_package(path)``, or from C++ with ``AOTIModelPackageLoader``.
    """

    def export(
        self,
        module: nn.Module,
        args: tuple[object, ...] | None = None,
        path: Target = None,
        *,
        kwargs: Mapping[str, object] | None = None,
        dynamic_shapes: object = None,
        verify: bool = True,
        tolerance: float = 1e-5,
        inductor_configs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """See ``fulmen_protocols.Exporter.export``; returns the loaded package, a callable.

        Options of its own:
            verify: whether to run the package and to compare it with the module before it is written.
            tolerance: largest difference, relative to the largest magnitude in an output, or to 1 if that is smaller.
            inductor_configs: settings of the compiler.
            options: of ``torch.export.export``: ``strict`` and so on.

        Raises:
            BackendUnavailable: there is no C++ compiler.
        """
        inputs = Inputs.of(_WHAT, module, args, kwargs)
        shapes = Shapes(_WHAT, inputs, dynamic_shapes)
        with staged(_WHAT, path, "model.pt2") as file:
            _require_compiler()
            with Eager(_WHAT, module) as eager, quiet():
                eager.outputs(inputs)  # an error of forward's own comes as it is
                program = capture(_WHAT, module, inputs, shapes, options)
                inductor = _inductor()
                package = f"{file}.pt2"  # the compiler insists on this ending; the artifact may have any name
                try:
                    inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=inductor_configs)
                # The compiler, and the C++ compiler under it, raise anything.
                except Exception as error:
                    raise unexportable(_WHAT, module, error, _ADVICE, program) from error
                compiled = inductor.aoti_load_package(package)
                os.replace(package, file)
                if verify:
                    samples = [inputs, other_sizes(program, shapes.at_least_two(inputs))]
                    agree(_WHAT, eager, lambda own: tensors_in(compiled(*own.args, **own.kwargs)), samples, tolerance)
        return compiled


def _inductor() -> Any:
    import torch._inductor  # pyright: ignore[reportMissingImports, reportUnusedImport]  # 1 s, for this format alone

    return torch._inductor


def _require_compiler() -> None:
    from torch._inductor import config

    found = cast("str | Sequence[str | None]", cast("Any", config).cpp.cxx)
    names = [name for name in ([found] if isinstance(found, str) else found) if name]
    for name in names:
        try:
            subprocess.run([name, "--version"], capture_output=True, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return
    raise BackendUnavailable(
        f"{_WHAT} compiles C++, and no compiler runs here: tried {', '.join(map(repr, names))}. "
        "Install g++ or clang++, or name one in the environment variable CXX."
    )
