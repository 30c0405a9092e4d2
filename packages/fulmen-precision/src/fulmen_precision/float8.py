"""float8 training: the matrix products of large linear layers in float8, everything else in bfloat16."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from fulmen_precision._default_dtype import DefaultDtype
from fulmen_precision._linears import linears, sizes
from fulmen_precision._tensors import cast_floating
from fulmen_protocols import BackendUnavailable, MisconfigurationException, PrecisionPlan, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextlib import AbstractContextManager

    from torch import nn

__all__ = ["Float8Precision", "bfloat16", "mixed"]

_RECIPES = ("auto", "tensorwise", "rowwise", "rowwise_with_gw_hp")
# The hardware multiplies float8 matrices in tiles of 16.
_TILE = 16
# Below this the casts of the operands cost more than the faster product saves.
_PAYS_FROM = 1024
_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0

_log = logging.getLogger(__name__)


class Float8Precision:
    """float8 matrix products by torchao, with scales found from each tensor as it comes (no state, no calibration).

    Inputs and weights are cast to e4m3, gradients to e5m2, each with a scale of its own; sums are float32. Layers keep
    their weights and their names, so checkpoints are exchanged freely with every other precision. Without
    ``torch.compile`` the casts are separate kernels and cost more than they save: compile the model.

    Args:
        weights: dtype in which parameters are stored. float32: the optimizer works in float32, and what is not a float8
            product runs under bfloat16 autocast (``"fp8-mixed"``). bfloat16: everything else is bfloat16
            (``"fp8-bf16"``).
        recipe: how scales are shared. "tensorwise": one per tensor, the fastest. "rowwise": one per row, more exact.
            "rowwise_with_gw_hp": as rowwise, with the weights' gradients computed in bfloat16; for bfloat16 weights.
            "auto": tensorwise, as the finer recipes are slower than bfloat16 for models of some billion parameters.
        device: kind of device the model will run on.
        ignore_modules: names of modules that stay as they are, with everything below them.
        min_features: layers with fewer inputs or outputs stay in bfloat16.
        emulate: cast to float8 and back and multiply in the original dtype: the numbers of float8 on any device,
            slower. For tests.

    Raises:
        ValueError: an unknown recipe or dtype.
        BackendUnavailable: torchao is missing, or the device has no float8.
    """

    def __init__(
        self,
        weights: torch.dtype = torch.float32,
        recipe: Literal["auto", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = "auto",
        *,
        device: str | torch.device = "cuda",
        ignore_modules: Collection[str] = (),
        min_features: int = _PAYS_FROM,
        emulate: bool = False,
    ) -> None:
        if weights not in (torch.float32, torch.bfloat16):
            raise MisconfigurationException(
                f"Float8Precision got weights={weights!r}. Allowed: torch.float32, torch.bfloat16."
            )
        if recipe not in _RECIPES:
            raise MisconfigurationException(
                f"Float8Precision got recipe={recipe!r}.{did_you_mean(str(recipe), _RECIPES)} "
                f"Allowed: {', '.join(map(repr, _RECIPES))}."
            )
        if recipe == "rowwise_with_gw_hp" and weights is torch.float32:
            raise MisconfigurationException(
                "Float8Precision got recipe='rowwise_with_gw_hp' with weights=torch.float32: the gradients of weights "
                "would be products of float32 and bfloat16, which torchao does not compute. "
                "Use weights=torch.bfloat16, or recipe='rowwise'."
            )
        self.precision = "fp8-mixed" if weights is torch.float32 else "fp8-bf16"
        if find_spec("torchao") is None:
            raise BackendUnavailable(
                f"precision {self.precision!r} needs torchao, which is not installed: "
                "pip install 'fulmen-precision[fp8]'"
            )
        kind = torch.device(device).type
        self.weights = weights
        self.emulate = emulate
        self._check_kind(kind)
        self.recipe: str = "tensorwise" if recipe == "auto" else recipe
        self.device = kind
        self.ignore_modules = frozenset(ignore_modules)
        self.min_features = max(min_features, _TILE)
        self.converted: tuple[str, ...] = ()
        """Names of the layers that compute in float8, after ``convert_module``."""

    def plan(self) -> PrecisionPlan:
        """``compute`` is that of all but the chosen layers; their operands are float8, their results bfloat16."""
        return PrecisionPlan(
            parameter=self.weights,
            compute=torch.bfloat16,
            reduction=self.weights,
            output=torch.get_default_dtype(),
            scaler="none",
        )

    def check_device(self, kind: str) -> None:
        """Refuse a run on other devices than this was made for.

        Raises:
            BackendUnavailable: devices of ``kind`` have no float8.
            ValueError: they have, or it is emulated, and ``device`` is another one.
        """
        self._check_kind(kind)
        if kind != self.device:
            raise MisconfigurationException(
                f"Float8Precision(device={self.device!r}): the run is on {kind!r}. Give device={kind!r}."
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """``replace_layers``, and parameters in bfloat16 if the weights are to be.

        Raises:
            BackendUnavailable: this GPU has no float8.
            ValueError: no layer is fit for float8.
        """
        module = self.replace_layers(module)
        return module.to(torch.bfloat16) if self.weights is torch.bfloat16 else module

    def replace_layers(self, module: nn.Module) -> nn.Module:
        """Let large linear layers of ``module`` compute in float8, in place, with the parameters they have.

        Raises:
            BackendUnavailable: this GPU has no float8.
            ValueError: no layer is large enough for float8 to pay, or none has sizes that are multiples of 16.
        """
        self._require_hardware()
        # torchao is an optional library with types of its own; this is the one place that calls it.
        float8 = cast("Any", importlib.import_module("torchao.float8"))
        candidates = list(linears(module, self.ignore_modules))
        chosen = {name for name, layer in candidates if self._pays(layer)}
        if not chosen and any(type(layer).__name__ == "Float8Linear" for layer in module.modules()):
            return module  # by an earlier run, or by the user
        if not chosen:
            found = f"the largest are {sizes(candidates)}" if candidates else "it has none"
            raise MisconfigurationException(
                f"precision {self.precision!r}: no linear layer of {type(module).__name__} is fit for float8; {found}. "
                f"Inputs and outputs must be multiples of {_TILE} and at least {self.min_features}: below that the "
                f"casts cost more than the product saves. Use {self._instead!r}, or "
                f"Float8Precision(min_features={_TILE}) to insist."
            )

        def fits(_layer: nn.Module, name: str) -> bool:
            return name in chosen

        converted = cast(
            "nn.Module",
            float8.convert_to_float8_training(module, config=self._config(float8), module_filter_fn=fits),
        )
        self.converted = tuple(sorted(chosen))
        _log.info(
            "%s: %d of %d linear layers compute in float8 (%s); the others in bfloat16.",
            self.precision, len(chosen), len(candidates), self.recipe,
        )  # fmt: skip
        return converted

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new parameters and floating tensors have the weights' dtype."""
        return DefaultDtype(self.weights)

    def forward_context(self) -> AbstractContextManager[object]:
        """bfloat16 autocast where weights are float32; else bfloat16 as torch's default dtype."""
        if self.weights is torch.float32:
            return torch.autocast(self.device, dtype=torch.bfloat16)
        return DefaultDtype(torch.bfloat16)

    def convert_input(self, data: object) -> object:
        """``data`` with floating tensors in bfloat16 where everything is; as it is where autocast casts."""
        return data if self.weights is torch.float32 else cast_floating(data, torch.bfloat16)

    def convert_output(self, data: object) -> object:
        """``data`` with its floating tensors cast to ``torch.get_default_dtype()``."""
        return cast_floating(data, torch.get_default_dtype())

    @property
    def _instead(self) -> str:
        return "bf16-mixed" if self.weights is torch.float32 else "bf16-true"

    def _check_kind(self, kind: str) -> None:
        if kind != "cuda" and not self.emulate:
            raise BackendUnavailable(
                f"precision {self.precision!r} on device {kind!r}: float8 products need an NVIDIA GPU of compute "
                f"capability 8.9 or more. Use {self._instead!r}, or Float8Precision(device={kind!r}, emulate=True) to "
                "see float8's numbers."
            )

    def _pays(self, layer: nn.Linear) -> bool:
        smaller = min(layer.in_features, layer.out_features)
        return smaller >= self.min_features and not layer.in_features % _TILE and not layer.out_features % _TILE

    def _config(self, float8: Any) -> Any:
        config = float8.Float8LinearConfig.from_recipe_name(self.recipe)
        return replace(config, emulate=True) if self.emulate else config

    def _require_hardware(self) -> None:
        if self.emulate:
            return
        if not torch.cuda.is_available():
            raise BackendUnavailable(
                f"precision {self.precision!r}: torch finds no usable CUDA device. Run where "
                "torch.cuda.is_available() is True, or use Float8Precision(device='cpu', emulate=True)."
            )
        found = torch.cuda.get_device_capability()
        if found < _CAPABILITY:
            raise BackendUnavailable(
                f"precision {self.precision!r} needs a GPU of compute capability 8.9 or more; "
                f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}. Use {self._instead!r}."
            )


def mixed(*, device: str = "cuda") -> Float8Precision:
    """Make the precision registered as ``"fp8-mixed"``: float32 weights."""
    return Float8Precision(torch.float32, device=device)


def bfloat16(*, device: str = "cuda") -> Float8Precision:
    """Make the precision registered as ``"fp8-bf16"``: bfloat16 weights."""
    return Float8Precision(torch.bfloat16, device=device)
