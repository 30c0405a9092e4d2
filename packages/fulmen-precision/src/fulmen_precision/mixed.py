"""Mixed precision: float32 parameters, matrix products in half precision through autocast.

Neither class casts inputs. Autocast casts what enters a matrix product by itself, whereas a batch cast up front would
lose precision in everything else it meets: targets of a regression, the input of a normalisation, a timestamp.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch.amp import GradScaler
from torch.optim import LBFGS

from fulmen_precision._default_dtype import DefaultDtype
from fulmen_precision._tensors import cast_floating
from fulmen_protocols import BackendUnavailable, MisconfigurationException, PrecisionPlan, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["MixedPrecision", "ScaledMixedPrecision", "autocast_cache_is_safe", "bfloat16", "half"]

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MixedPrecision:
    """Autocast to float16 (``"16-mixed"``) or bfloat16 (``"bf16-mixed"``) on one kind of device.

    ``"16-mixed"`` gives a ``ScaledMixedPrecision``, which alone offers the scaler's methods: an ability that is not
    offered is absent. It runs float16 on a CPU too, as asked.

    Args:
        precision: which of the two.
        device: kind of device on which autocast works, ``"cuda"`` for example; an index is ignored.
        scaler: replaces the default ``torch.amp.GradScaler(device)``; only for ``"16-mixed"``.
        cache_casts: whether a weight used twice in one forward is cast once. None: yes, unless this version of torch
            loses gradients when a cast was first made under ``torch.no_grad()`` (see ``autocast_cache_is_safe``).

    Raises:
        ValueError: an unknown precision or device, or a scaler that would not be used.
    """

    def __new__(
        cls,
        precision: Literal["16-mixed", "bf16-mixed"] = "bf16-mixed",
        device: str | torch.device = "cpu",
        scaler: GradScaler | None = None,
        *,
        cache_casts: bool | None = None,
    ) -> MixedPrecision:
        """Choose the class that offers exactly what ``precision`` needs."""
        return object.__new__(ScaledMixedPrecision if cls is MixedPrecision and precision == "16-mixed" else cls)

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"] = "bf16-mixed",
        device: str | torch.device = "cpu",
        scaler: GradScaler | None = None,
        *,
        cache_casts: bool | None = None,
    ) -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"MixedPrecision got precision={precision!r}.{did_you_mean(str(precision), _DTYPES)} "
                f"Allowed: {', '.join(map(repr, _DTYPES))}."
            )
        if precision == "16-mixed" and not isinstance(self, ScaledMixedPrecision):
            raise MisconfigurationException(
                f"{type(self).__qualname__} got precision='16-mixed' but is no ScaledMixedPrecision: losses would not "
                "be scaled and small gradients would become zero. Derive it from ScaledMixedPrecision."
            )
        if scaler is not None and precision != "16-mixed":
            raise MisconfigurationException(
                f"MixedPrecision got scaler={scaler!r} with precision={precision!r}: bfloat16 has float32's range and "
                "needs none. Remove scaler=, or use precision='16-mixed'."
            )
        self.precision: str = precision
        self.device = _autocast_device(device)
        self._dtype = _DTYPES[precision]
        self._cache_casts = autocast_cache_is_safe() if cache_casts is None else cache_casts

    def plan(self) -> PrecisionPlan:
        """float32 parameters and gradients, half-precision matrix products."""
        return PrecisionPlan(
            parameter=torch.float32,
            compute=self._dtype,
            reduction=torch.float32,
            output=torch.get_default_dtype(),
            scaler="none",
        )

    def check_device(self, kind: str) -> None:
        """Refuse a run on other devices than autocast was made for: there it would do nothing.

        Raises:
            ValueError: ``kind`` is another one.
        """
        if kind != self.device:
            raise MisconfigurationException(
                f"{type(self).__qualname__}({self.precision!r}, device={self.device!r}): the run is on {kind!r}, where "
                f"this autocast does nothing. Give device={kind!r}, or precision={self.precision!r} in its place."
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` as it is: autocast works from float32 parameters."""
        return module

    def init_context(self) -> AbstractContextManager[object]:
        """Within the block, new parameters and floating tensors are float32."""
        return DefaultDtype(torch.float32)

    def forward_context(self) -> AbstractContextManager[object]:
        """A new autocast block. Casts are kept until the outermost block ends, so a forward pass should be one."""
        return torch.autocast(self.device, dtype=self._dtype, cache_enabled=self._cache_casts)

    def convert_output(self, data: object) -> object:
        """``data`` with its floating tensors cast to ``torch.get_default_dtype()``, as a raw loop expects."""
        return cast_floating(data, torch.get_default_dtype())


class ScaledMixedPrecision(MixedPrecision):
    """``"16-mixed"``: float16 autocast with a dynamic loss scale, because float16 gradients underflow below 6e-8.

    Order in a step: ``scale`` → backward → ``unscale`` → clipping and hooks → ``step`` → ``update``. A step skipped for
    a non-finite gradient still counts as a step for schedulers and counters; only the weights stay.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"] = "16-mixed",
        device: str | torch.device = "cpu",
        scaler: GradScaler | None = None,
        *,
        cache_casts: bool | None = None,
    ) -> None:
        super().__init__(precision, device, scaler, cache_casts=cache_casts)
        if precision != "16-mixed":
            raise MisconfigurationException(
                f"ScaledMixedPrecision got precision={precision!r}; it is for '16-mixed'. Use MixedPrecision."
            )
        if scaler is not None:
            _check_enabled(scaler, self.device)
            self.scaler = scaler
        # Optimizers whose gradients are unscaled and not yet used.
        self._unscaled: set[int] = set()

    @cached_property
    def scaler(self) -> GradScaler:
        """The ``torch.amp.GradScaler``; made at first use, as making it for CUDA initialises the driver.

        Raises:
            RuntimeError: torch cannot scale on this device here, because it is absent for example.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(
                "precision '16-mixed' on device 'cuda': torch finds no usable CUDA device. "
                "Pass device='cpu', or run where torch.cuda.is_available() is True."
            )
        scaler = _LayoutScaler(self.device)
        _check_enabled(scaler, self.device)
        return scaler

    def plan(self) -> PrecisionPlan:
        """float32 parameters and gradients, float16 matrix products, a dynamic loss scale."""
        plan = super().plan()
        plan["scaler"] = "dynamic"
        return plan

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the current factor. Does not synchronise with the device."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of ``optimizer`` by the factor, in place; further calls before ``step`` do nothing.

        Fused optimizers are unscaled like any other, so that clipping and hooks see true gradients.

        Raises:
            RuntimeError: ``optimizer`` has stepped already and ``update`` was not called since.
            ValueError: ``optimizer`` is an LBFGS, or its gradients are float16.
        """
        if id(optimizer) in self._unscaled:
            return
        _refuse_lbfgs(optimizer)
        self.scaler.unscale_(optimizer)
        self._unscaled.add(id(optimizer))

    def step(self, optimizer: Optimizer) -> object:
        """Step ``optimizer`` unless a gradient is not finite, and return what its step returns (None when skipped).

        Unscales first when ``unscale`` was not called. Synchronises host and device, except with fused optimizers.

        Raises:
            RuntimeError: no parameter has a gradient, or ``optimizer`` stepped already since the last ``update``.
            ValueError: ``optimizer`` is an LBFGS.
        """
        _refuse_lbfgs(optimizer)
        try:
            result = self.scaler.step(optimizer)
        except AssertionError as error:
            raise RuntimeError(
                f"precision '16-mixed' cannot step {type(optimizer).__name__}: none of its parameters has a gradient "
                "that went through the scaler. Call scale(loss).backward() first, or skip this step."
            ) from error
        self._unscaled.discard(id(optimizer))
        return result

    def update(self) -> None:
        """Adapt the factor: halved after a non-finite gradient, doubled after 2000 finite updates (torch's defaults).

        Raises:
            RuntimeError: no optimizer was unscaled or stepped since the last call.
        """
        try:
            self.scaler.update()
        except AssertionError as error:
            raise RuntimeError(
                "precision '16-mixed' cannot update its scale: no optimizer has stepped since the last update."
            ) from error
        self._unscaled.clear()

    def state_dict(self) -> dict[str, object]:
        """The scaler's factor, growth settings and counter, as plain numbers. Synchronises host and device."""
        return cast("dict[str, object]", self.scaler.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore what ``state_dict`` gave.

        Raises:
            ValueError: entries are missing, as in a checkpoint of a run without a scaler.
        """
        missing = sorted(self.scaler.state_dict().keys() - state_dict.keys())
        if missing:
            raise MisconfigurationException(
                f"the state of precision '16-mixed' lacks {', '.join(missing)}; found {sorted(state_dict)}. "
                "It comes from a run without a gradient scaler, or from another precision."
            )
        self.scaler.load_state_dict(dict(state_dict))
        self._unscaled.clear()


class _LayoutScaler(GradScaler):
    """Also for gradients of which ranks hold parts, laid out in several ways, some of them not at all.

    torch's kernel takes DTensors of one mesh at a time, and agrees on a non-finite gradient along those dimensions only
    along which the first one is sharded (torch 2.13, ``found_inf_reduce_handler``): ranks could decide differently.
    """

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        layouts: dict[object, list[Tensor]] = {}
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            gradient = parameter.grad
            if gradient is not None:
                layout = (getattr(gradient, "device_mesh", None), getattr(gradient, "placements", None))
                layouts.setdefault(layout, []).append(parameter)
        if len(layouts) < 2:
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        found: dict[torch.device, Tensor] = {}
        for parameters in layouts.values():
            part = cast("Optimizer", _Parameters([{"params": parameters}]))
            for device, flag in super()._unscale_grads_(part, inv_scale, found_inf.clone(), allow_fp16).items():
                found[device] = torch.maximum(found[device], flag) if device in found else flag
        return found


class _Parameters(NamedTuple):
    """Of an optimizer, what is read to unscale."""

    param_groups: list[dict[str, list[Tensor]]]


def half(*, device: str = "cpu") -> MixedPrecision:
    """Make the precision registered as ``"16-mixed"`` for ``device``."""
    return ScaledMixedPrecision("16-mixed", device)


def bfloat16(*, device: str = "cpu") -> MixedPrecision:
    """Make the precision registered as ``"bf16-mixed"`` for ``device``."""
    return MixedPrecision("bf16-mixed", device)


@cache
def autocast_cache_is_safe() -> bool:
    """Whether a cast that autocast cached under ``torch.no_grad()`` still carries gradients afterwards.

    Older versions of torch keep the gradient-less cast, so a forward pass under ``no_grad`` inside a training step
    silently cuts its weights off from the loss. Found by trying, once per process; draws no random number.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        weight = torch.ones(1, 1, device="cpu", dtype=torch.float32, requires_grad=True)
        data = torch.ones(1, 1, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            torch.mm(data, weight)
        return torch.mm(data, weight).requires_grad


def _autocast_device(device: str | torch.device) -> str:
    try:
        kind = torch.device(device).type
        usable = torch.amp.is_autocast_available(kind)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"MixedPrecision got device={device!r}, which torch does not know: {str(error).splitlines()[0]}"
        ) from error
    if not usable:
        raise MisconfigurationException(
            f"MixedPrecision got device={device!r}: torch has no autocast for it. Use a '-true' precision there."
        )
    return kind


def _check_enabled(scaler: GradScaler, device: str) -> None:
    if not scaler.is_enabled():
        raise BackendUnavailable(
            f"precision '16-mixed' on device {device!r}: the gradient scaler is disabled, so small gradients would "
            "silently become zero. Make it with enabled=True, on a device that torch finds."
        )


def _refuse_lbfgs(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            "LBFGS evaluates the loss several times per step, which precision '16-mixed' cannot scale. "
            "Use 'bf16-mixed' or '32-true', or another optimizer."
        )
