"""Linear layers with weights of 4 or 8 bits, by bitsandbytes."""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fulmen_precision._default_dtype import DefaultDtype
from fulmen_precision._linears import has_bias, linears, replace
from fulmen_precision._tensors import cast_floating
from fulmen_protocols import BackendUnavailable, MisconfigurationException, PrecisionPlan, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import AbstractContextManager
    from types import TracebackType

__all__ = ["BitsandbytesPrecision"]

_MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
_COMPUTE = (torch.float16, torch.bfloat16, torch.float32)


class BitsandbytesPrecision:
    """Stores the weights of linear layers in 4 or 8 bits and computes in half precision, on NVIDIA GPUs and CPUs.

    The weights of the 4-bit modes and of ``"int8"`` are frozen: train what is beside them (adapters, heads, norms).
    ``"int8-training"`` keeps trainable half-precision weights and only multiplies in 8 bits.

    A layer is quantized when the module is converted, and when weights that are not quantized are loaded into it, so
    a checkpoint of any other precision can be read. Its own checkpoints hold the packed weights and their scales.

    Args:
        mode: "nf4" and "fp4": 4 bits per weight and a scale for every 64 weights; "-dq" quantizes the scales as well.
            "int8": 8 bits, values beyond 6 in half precision (https://arxiv.org/abs/2208.07339). "int8-training".
        dtype: of the products and of everything that is not quantized. None: float16 for the int8 modes, else bfloat16
            (float16 on a GPU without it). Adam in float16 makes NaN of its default ``eps``, which is 0 there: give it
            1e-4, or use bfloat16.
        ignore_modules: names of modules that stay as they are, with everything below them.
        device: kind of device the model will run on.

    Raises:
        ValueError: an unknown mode or dtype.
        BackendUnavailable: bitsandbytes is missing, or does not support the device.
    """

    def __init__(
        self,
        mode: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"],
        dtype: torch.dtype | None = None,
        ignore_modules: Collection[str] | None = None,
        *,
        device: str | torch.device = "cuda",
    ) -> None:
        if mode not in _MODES:
            raise MisconfigurationException(
                f"BitsandbytesPrecision got mode={mode!r}.{did_you_mean(str(mode), _MODES)} "
                f"Allowed: {', '.join(map(repr, _MODES))}."
            )
        if dtype is not None and dtype not in _COMPUTE:
            raise MisconfigurationException(
                f"BitsandbytesPrecision got dtype={dtype!r}. Allowed: {', '.join(map(str, _COMPUTE))}, or None."
            )
        if find_spec("bitsandbytes") is None:
            raise BackendUnavailable(
                f"BitsandbytesPrecision(mode={mode!r}) needs bitsandbytes, which is not installed: "
                "pip install 'fulmen-precision[bitsandbytes]'"
            )
        self.mode: str = mode
        kind = torch.device(device).type
        self.check_device(kind)
        self.precision = f"bnb-{mode}"
        self.ignore_modules = frozenset(ignore_modules or ())
        self.dtype = dtype or _default_dtype(mode, kind)

    def plan(self) -> PrecisionPlan:
        """The dtype of everything that is not quantized, and of the products."""
        return PrecisionPlan(
            parameter=self.dtype,
            compute=self.dtype,
            reduction=self.dtype,
            output=torch.get_default_dtype(),
            scaler="none",
        )

    def check_device(self, kind: str) -> None:
        """Refuse devices that bitsandbytes does not know.

        Raises:
            BackendUnavailable: ``kind`` is neither "cuda" nor "cpu".
        """
        if kind not in ("cuda", "cpu"):
            raise BackendUnavailable(
                f"BitsandbytesPrecision(mode={self.mode!r}) on device {kind!r}: bitsandbytes quantizes on CUDA and on "
                "CPUs. Use another device, or another precision."
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Quantize the linear layers of ``module`` where they are, and cast everything else to the dtype.

        Layers of bitsandbytes that the module has already stay what they are.

        Raises:
            ValueError: the module has no linear layer, or ``ignore_modules`` names all of them.
        """
        library = _library()
        chosen = [name for name, _ in linears(module, self.ignore_modules)]
        has_own = any(_is_quantized(layer, library) for layer in module.modules())
        if not chosen and not has_own:
            raise MisconfigurationException(
                f"BitsandbytesPrecision(mode={self.mode!r}): {type(module).__name__} has no linear layer to quantize"
                + (f" outside of ignore_modules={sorted(self.ignore_modules)}." if self.ignore_modules else ".")
                + " Use another precision."
            )
        kept = {id(p) for layer in module.modules() if _is_quantized(layer, library) for p in layer.parameters()}
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and id(tensor) not in kept:
                tensor.data = tensor.data.to(self.dtype)
        return replace(module, chosen, self._quantized)

    def replace_layers(self, module: nn.Module) -> nn.Module:
        """Refuse: called where a strategy shards the parameters, which packed weights do not allow.

        Raises:
            ValueError: always.
        """
        raise MisconfigurationException(
            f"BitsandbytesPrecision(mode={self.mode!r}): the strategy shards or casts parameters by itself, and packed "
            "weights are neither sharded nor cast. Use strategy='ddp' or one device, or another precision."
        )

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, ``torch.nn.Linear`` makes quantized layers and new tensors have the dtype.

        So a model that would not fit in half precision is never whole in it. With ``ignore_modules`` layers have no
        names yet, so they are made plain and quantized by ``convert_module``.
        """
        if self.ignore_modules:
            return DefaultDtype(self.dtype)
        return _QuantizedLinears(self.dtype, self._quantized)

    def forward_context(self) -> AbstractContextManager[object]:
        """A context in which floating tensors that ``forward`` makes have the dtype."""
        return DefaultDtype(self.dtype)

    def convert_input(self, data: object) -> object:
        """``data`` with its floating tensors in the dtype."""
        return cast_floating(data, self.dtype)

    def convert_output(self, data: object) -> object:
        """``data`` with its floating tensors cast to ``torch.get_default_dtype()``."""
        return cast_floating(data, torch.get_default_dtype())

    def _quantized(self, layer: nn.Linear) -> nn.Module:
        device, bias = layer.weight.device, has_bias(layer)
        arguments: dict[str, object] = {"bias": bias, "device": torch.device("meta")}
        if self.mode.startswith("int8"):
            trains = self.mode == "int8-training"
            made = _int8_layer(_library())(
                layer.in_features,
                layer.out_features,
                has_fp16_weights=trains,
                threshold=6.0,
                **arguments,
            )
        else:
            made = _four_bit_layer(_library())(
                layer.in_features,
                layer.out_features,
                compute_dtype=self.dtype,
                compress_statistics=self.mode.endswith("-dq"),
                quant_type=self.mode[:3],
                **arguments,
            )
        if bias:
            made.bias = nn.Parameter(layer.bias.detach().to(self.dtype), requires_grad=layer.bias.requires_grad)
        made.dtype = self.dtype
        if device.type != "meta":  # there the weights are still to be loaded
            made.quantize(layer.weight.detach())
        return cast("nn.Module", made)


class _QuantizedLinears:
    """Within the block ``torch.nn.Linear(...)`` gives what ``make`` makes of the layer."""

    def __init__(self, dtype: torch.dtype, make: Callable[[nn.Linear], nn.Module]) -> None:
        self._default = DefaultDtype(dtype)
        self._make = make
        self._plain: list[type[nn.Linear]] = []

    def __enter__(self) -> None:
        self._default.__enter__()
        plain, make = nn.Linear, self._make
        self._plain.append(plain)

        class Linear(plain):  # type: ignore[misc, valid-type]
            """A linear layer that is quantized as soon as it is made."""

            def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportInconsistentConstructor]
                if cls is not Linear:  # a subclass of the user's own has its own forward
                    return object.__new__(cls)
                return make(plain(*args, **kwargs))

        nn.Linear = Linear  # type: ignore[misc]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        nn.Linear = self._plain.pop()  # type: ignore[misc]
        self._default.__exit__(kind, error, trace)


def _default_dtype(mode: str, device: str) -> torch.dtype:
    if mode.startswith("int8"):
        return torch.float16
    if device == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def _library() -> Any:
    return importlib.import_module("bitsandbytes")


def _is_quantized(layer: nn.Module, library: Any) -> bool:
    return isinstance(layer, (library.nn.Linear4bit, library.nn.Linear8bitLt))


@functools.cache
def _four_bit_layer(library: Any) -> Any:
    """The layer of 4-bit weights of bitsandbytes, made when that is first needed."""

    class FourBit(library.nn.Linear4bit):  # type: ignore[misc]
        """4-bit weights that can be loaded packed and plain."""

        def quantize(self, weight: Tensor) -> None:
            """Pack ``weight``, shape ``(out, in)``, on its device."""
            old: Any = self.weight
            self.weight: Any = library.nn.Params4bit(
                weight.to(self.dtype),
                requires_grad=False,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                quant_storage=old.quant_storage,
                module=self,
            ).to(weight.device)

        def _load_from_state_dict(
            self, state_dict: dict[str, Any], prefix: str, local: Any, strict: bool, missing: Any, unexpected: Any,
            errors: Any,
        ) -> None:  # fmt: skip
            name = f"{prefix}weight"
            weight = state_dict.get(name)
            extra = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            if isinstance(weight, Tensor):
                device = self.weight.device if self.weight.device.type != "meta" else weight.device
                if extra:
                    self.weight = library.nn.Params4bit.from_prequantized(
                        weight, extra, requires_grad=False, device=device, module=self
                    )
                elif tuple(weight.shape) == (self.out_features, self.in_features):
                    self.quantize(weight.to(device))
                else:
                    errors.append(f"{name} is neither packed nor of shape {(self.out_features, self.in_features)}")
            rest = {k: v for k, v in state_dict.items() if k != name and not k.startswith(f"{name}.")}
            nothing: list[str] = []
            nn.Linear._load_from_state_dict(self, rest, prefix, local, strict, nothing, unexpected, errors)  # pyright: ignore[reportPrivateUsage]
            missing.extend(each for each in nothing if each != name or weight is None)

    return FourBit


@functools.cache
def _int8_layer(library: Any) -> Any:
    """The layer of 8-bit weights of bitsandbytes, made when that is first needed."""

    class Int8(library.nn.Linear8bitLt):  # type: ignore[misc]
        """8-bit weights that can be loaded packed and plain."""

        def quantize(self, weight: Tensor) -> None:
            """Pack ``weight``, shape ``(out, in)``, on its device; keep it plain where it is to be trained."""
            trains = self.state.has_fp16_weights
            data = weight.to(self.dtype)
            parameter = library.nn.Int8Params(
                data if trains else data.cpu(), requires_grad=trains, has_fp16_weights=trains
            )
            self.weight = parameter if trains else parameter.to(weight.device)

        def forward(self, x: Tensor) -> Tensor:
            """Multiply in 8 bits by the weights of this moment; ``x`` has the shape ``(..., in)``."""
            state = self.state
            if not state.has_fp16_weights:
                return cast("Tensor", super().forward(x))
            # bitsandbytes quantizes trained weights anew only where they have no gradient, which holds if gradients
            # were set to None before the forward pass; after it, the pass would use the weights of long ago.
            state.CB = None
            # It multiplies trained weights in one way for training and in another for evaluation; on a CPU the second
            # needs an operator that there is on GPUs only, and the first takes no more than two dimensions.
            state.is_training = self.training or x.device.type == "cpu"
            bias = None if self.bias is None else self.bias.to(x.dtype)
            rows = library.matmul(x.reshape(-1, x.shape[-1]), self.weight, bias=bias, state=state)
            return cast("Tensor", rows.reshape(*x.shape[:-1], self.out_features))

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            weight = state_dict.get(f"{prefix}weight")
            if isinstance(weight, Tensor) and weight.is_floating_point() and not self.state.has_fp16_weights:
                device = self.weight.device if self.weight.device.type != "meta" else weight.device
                self.quantize(weight.to(device))
                state_dict = {**state_dict, f"{prefix}weight": self.weight.data}
            super()._load_from_state_dict(state_dict, prefix, *rest)

    return Int8
