"""float8 by NVIDIA's Transformer Engine: its layers, its recipes, its autocast."""

from __future__ import annotations

import importlib
import logging
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fulmen_precision._default_dtype import DefaultDtype
from fulmen_precision._linears import has_bias, linears, replace
from fulmen_precision._tensors import cast_floating
from fulmen_protocols import BackendUnavailable, MisconfigurationException, PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from contextlib import AbstractContextManager

__all__ = ["TransformerEnginePrecision", "bfloat16", "half"]

_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
_log = logging.getLogger(__name__)


class TransformerEnginePrecision:
    """float8 products with delayed scaling in Transformer Engine's layers, which take the place of torch's.

    Args:
        weights_dtype: of parameters and of what is no float8 product.
        recipe: a ``transformer_engine.common.recipe`` object, or a dict of ``DelayedScaling``'s arguments, where
            ``fp8_format`` may be the name of a ``Format``. None: Transformer Engine's own default.
        replace_layers: whether ``nn.Linear`` and ``nn.LayerNorm`` are replaced. None: unless the model has layers of
            Transformer Engine already.
        fallback_compute_dtype: dtype of the autocast around the rest. None: ``weights_dtype``.
        device: kind of device the model will run on.

    Raises:
        ValueError: a dtype that is none of the three, or a recipe with an unknown format.
        BackendUnavailable: Transformer Engine is missing, or the device is no NVIDIA GPU.
    """

    def __init__(
        self,
        *,
        weights_dtype: torch.dtype,
        recipe: Mapping[str, object] | object | None = None,
        replace_layers: bool | None = None,
        fallback_compute_dtype: torch.dtype | None = None,
        device: str | torch.device = "cuda",
    ) -> None:
        if weights_dtype not in _WEIGHTS:
            raise MisconfigurationException(
                f"TransformerEnginePrecision got weights_dtype={weights_dtype!r}. "
                f"Allowed: {', '.join(map(str, _WEIGHTS))}."
            )
        self.precision = "transformer-engine-float16" if weights_dtype is torch.float16 else "transformer-engine"
        if find_spec("transformer_engine") is None:
            raise BackendUnavailable(
                f"precision {self.precision!r} needs Transformer Engine, which is not installed: "
                "pip install 'transformer-engine[pytorch]' (it is built against your torch and CUDA)"
            )
        self.check_device(torch.device(device).type)
        self.weights_dtype = weights_dtype
        self.recipe = _recipe(recipe)
        self._replaces = replace_layers
        self.fallback_compute_dtype = fallback_compute_dtype or weights_dtype

    def plan(self) -> PrecisionPlan:
        """``compute`` is that of everything but the float8 products."""
        return PrecisionPlan(
            parameter=self.weights_dtype,
            compute=self.fallback_compute_dtype,
            reduction=self.weights_dtype,
            output=torch.get_default_dtype(),
            scaler="none",
        )

    def check_device(self, kind: str) -> None:
        """Refuse devices that Transformer Engine does not know.

        Raises:
            BackendUnavailable: ``kind`` is not "cuda".
        """
        if kind != "cuda":
            raise BackendUnavailable(
                f"precision {self.precision!r} on device {kind!r}: Transformer Engine runs on NVIDIA GPUs only. "
                "Use 'bf16-mixed' there."
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """``replace_layers``, with parameters in the weights' dtype."""
        return self.replace_layers(module.to(self.weights_dtype))

    def replace_layers(self, module: nn.Module) -> nn.Module:
        """Put Transformer Engine's layers in the place of torch's, with the same parameters."""
        layers = _layers()
        has_own = any(type(layer).__module__.startswith("transformer_engine.") for layer in module.modules())
        if has_own and self._replaces:
            _log.warning("replace_layers=True, but the model has layers of Transformer Engine: nothing is replaced.")
        if has_own or self._replaces is False:
            return module
        fitting = [(name, layer) for name, layer in linears(module) if _fits(layer)]
        for name, layer in linears(module):
            if not _fits(layer):
                _log.warning(
                    "%s (%d x %d) stays torch's: float8 needs inputs that are a multiple of 8 and outputs that are a "
                    "multiple of 16.", name, layer.in_features, layer.out_features,
                )  # fmt: skip
        module = replace(module, [name for name, _ in fitting], lambda layer: _linear(layers, layer))
        for name, norm in list(cast("Iterator[tuple[str, nn.Module]]", module.named_modules())):
            if type(norm) is nn.LayerNorm and name and has_bias(norm):
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, _norm(layers, norm))
        return module

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new parameters and floating tensors have the weights' dtype."""
        return DefaultDtype(self.weights_dtype)

    @contextmanager
    def forward_context(self) -> Generator[None]:
        """Transformer Engine's autocast within torch's, with the weights' dtype as default."""
        with ExitStack() as stack:
            stack.enter_context(DefaultDtype(self.weights_dtype))
            stack.enter_context(torch.autocast("cuda", dtype=self.fallback_compute_dtype))
            stack.enter_context(_layers().fp8_autocast(enabled=True, fp8_recipe=self.recipe))
            yield

    def convert_input(self, data: object) -> object:
        """``data`` with its floating tensors in the weights' dtype."""
        return cast_floating(data, self.weights_dtype)

    def convert_output(self, data: object) -> object:
        """``data`` with its floating tensors cast to ``torch.get_default_dtype()``."""
        return cast_floating(data, torch.get_default_dtype())


def bfloat16(*, device: str = "cuda") -> TransformerEnginePrecision:
    """Make the precision registered as ``"transformer-engine"``: bfloat16 weights."""
    return TransformerEnginePrecision(weights_dtype=torch.bfloat16, device=device)


def half(*, device: str = "cuda") -> TransformerEnginePrecision:
    """Make the precision registered as ``"transformer-engine-float16"``: float16 weights."""
    return TransformerEnginePrecision(weights_dtype=torch.float16, device=device)


def _layers() -> Any:
    return importlib.import_module("transformer_engine.pytorch")


def _recipe(recipe: Mapping[str, object] | object | None) -> object:
    if recipe is None or not isinstance(recipe, dict):
        return recipe
    library = importlib.import_module("transformer_engine.common.recipe")
    arguments = dict(cast("dict[str, object]", recipe))
    name = arguments.get("fp8_format")
    if isinstance(name, str):
        if not hasattr(library.Format, name):
            formats = ", ".join(sorted(cast("dict[str, object]", library.Format.__members__)))
            raise MisconfigurationException(f"TransformerEnginePrecision got fp8_format={name!r}. Allowed: {formats}.")
        arguments["fp8_format"] = getattr(library.Format, name)
    return library.DelayedScaling(**arguments)


def _fits(layer: nn.Linear) -> bool:
    return not layer.in_features % 8 and not layer.out_features % 16


def _linear(layers: Any, layer: nn.Linear) -> nn.Module:
    made = layers.Linear(layer.in_features, layer.out_features, bias=has_bias(layer))
    return _with_parameters_of(layer, made)


def _norm(layers: Any, norm: nn.LayerNorm) -> nn.Module:
    return _with_parameters_of(norm, layers.LayerNorm(norm.normalized_shape[0], eps=norm.eps))


def _with_parameters_of(old: nn.Module, new: nn.Module) -> nn.Module:
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    return new
